"""Adapters in live models: what is trained, taken out, put back and loaded, against the maths."""

import copy
import math
from collections import OrderedDict

import pytest
import torch

from lorakit.diffusion.frozen import leave_casts_to_autocast
from lorakit.diffusion.lora import (
    active_adapters,
    adapter_layers,
    add_lora,
    extract,
    insert,
    load_lora,
    lora_disabled,
    unwrap,
)
from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import TARGET_PRESETS, LoraFile, LoraPair, kohya_name, lora_bytes
from lorakit.weights.lora_reader import read_lora

PRESETS = ["attention", "attention+ff", "all"]


@pytest.fixture(scope="module")
def unet(tiny_unet):
    """Factory of copies, which is faster than building each anew."""
    model = tiny_unet()
    return lambda: copy.deepcopy(model)


@pytest.fixture(scope="module")
def text_encoder(tiny_text_encoder):
    model = tiny_text_encoder()
    return lambda: copy.deepcopy(model)


def randomise(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def trained(model, seed=0, **options):
    randomise(add_lora(model, **({"rank": 4, "alpha": 2.0, "seed": seed} | options)), seed)
    return model


@torch.no_grad()
def output(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "conv_in"):
        latents, states = (
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.randn(1, 5, 16, generator=generator),
        )
        return model(latents, 300, states).sample
    return model(torch.randint(100, (1, 7), generator=generator)).last_hidden_state


def assert_equal_pairs(found, expected):
    assert found.keys() == expected.keys() and found
    for name, one in expected.items():
        assert found[name].alpha == one.alpha and found[name].tensors().keys() == one.tensors().keys()
        assert all(torch.equal(found[name].tensors()[slot], tensor) for slot, tensor in one.tensors().items())


# ---- add_lora ----


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_adapts_the_layers_it_names_and_no_others(unet, preset):
    model = unet()
    ends = TARGET_PRESETS["unet"][preset]
    expected = {
        kohya_name("unet", name)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(f".{name}".endswith(f".{e}") for e in ends)
    }
    add_lora(model, rank=2, alpha=2, targets=preset)
    assert extract(model, "unet").keys() == expected
    kinds = {end for end in ends if any(name.endswith(end.replace(".", "_")) for name in expected)}
    assert kinds == set(ends)  # the tiny U-Net has every kind of layer


@pytest.mark.parametrize(("preset", "per_layer"), [("attention", 4), ("attention+ff", 6), ("all", 6)])
def test_presets_of_the_text_encoder(text_encoder, preset, per_layer):
    model = text_encoder()
    add_lora(model, rank=2, alpha=2, targets=preset)
    names = extract(model, "text_encoder")
    assert len(names) == 2 * per_layer
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in names)


def test_only_the_lora_trains_and_its_parameters_come_in_a_fixed_order(unet):
    model = unet()
    parameters = add_lora(model, rank=2, alpha=2, targets="all")
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters() if p.requires_grad]
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert len(parameters) == 2 * len(extract(model, "unet"))


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal"])
def test_a_fresh_lora_changes_nothing_and_gets_gradients(unet, init):
    model = unet()
    before = output(model)
    parameters = add_lora(model, rank=4, alpha=4, init=init, targets="attention")
    torch.testing.assert_close(output(model), before, rtol=0, atol=0 if init != "orthogonal" else 1e-6)
    model(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 16)).sample.square().mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in parameters) > 0


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal"])
def test_initial_weights_follow_the_seed_alone_and_leave_the_global_rng(unet, init):
    def weights(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        parameters = add_lora(unet(), rank=4, alpha=4, init=init, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return torch.cat([p.detach().flatten() for p in parameters])

    assert torch.equal(weights(1, 10), weights(1, 11))
    assert not torch.equal(weights(1, 10), weights(2, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_weights_are_float32_over_a_half_precision_base(unet, dtype, use_dora):
    model = unet().to(dtype)
    parameters = add_lora(model, rank=2, alpha=2, use_dora=use_dora)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def step_under_autocast(model, left_to_autocast):
    """Gradients of the LoRA, and the bytes of distinct tensors that were kept for them."""
    parameters = add_lora(model, rank=2, alpha=2)
    randomise(parameters)
    if left_to_autocast:
        leave_casts_to_autocast(model, None)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its address
        return tensor

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.train()(x, 300, states).sample.float().square().mean().backward()
    return [p.grad for p in parameters], sum(t.untyped_storage().nbytes() for t in kept.values())


def test_casts_left_to_autocast_keep_less_and_change_no_bit(unet):
    (cast, more), (left, less) = (step_under_autocast(unet().bfloat16(), way) for way in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(cast, left, strict=True)) and cast[0].abs().sum() > 0
    assert less < more


def test_a_dora_keeps_its_cast(unet):
    model = unet()
    add_lora(model, rank=2, alpha=2, use_dora=True)
    leave_casts_to_autocast(model)
    assert all(layer.cast_input_dtype_enabled for layer in adapter_layers(model, "default").values())


def test_orthogonal_init_refuses_what_it_cannot_do(unet):
    with pytest.raises(UserError, match="is a convolution"):
        add_lora(unet(), rank=4, alpha=4, init="orthogonal", targets="all")
    with pytest.raises(UserError, match="even rank, but rank is 3"):
        add_lora(unet(), rank=3, alpha=4, init="orthogonal", targets=["to_q"])


def test_a_list_of_targets_is_taken_as_it_is_and_checked(unet):
    model = unet()
    add_lora(model, rank=2, alpha=2, targets=["attn2.to_k", "conv_in"])
    names = extract(model, "unet")
    assert "lora_unet_conv_in" in names
    assert len(names) > 1 and all(n.endswith("attn2_to_k") for n in names if n != "lora_unet_conv_in")
    with pytest.raises(UserError, match="ends in to_qq; did you mean .*to_q"):
        add_lora(unet(), rank=2, alpha=2, targets=["to_k", "to_qq"])
    with pytest.raises(UserError, match=r"did you mean .*ff\.net\.0\.proj"):
        add_lora(unet(), rank=2, alpha=2, targets=["ff.net.0.prj"])
    with pytest.raises(UserError, match="no such preset; choose attention, attention\\+ff, all"):
        add_lora(unet(), rank=2, alpha=2, targets="everything")


def test_a_preset_may_name_a_kind_of_layer_that_the_base_lacks(tiny_unet):
    model = tiny_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    add_lora(model, rank=2, alpha=2, targets="all")
    assert not any("samplers" in name for name in extract(model, "unet"))


# ---- extract and insert ----


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_extracted_explains_the_live_layer(unet, use_rslora):
    model = trained(unet(), targets="all", alpha=3.0, use_rslora=use_rslora)
    scale = 3.0 / (2.0 if use_rslora else 4.0)
    plain = unet()
    modules = dict(plain.named_modules())
    flat = {kohya_name("unet", name): name for name in modules}
    for name, one in extract(model, "unet").items():
        assert one.scale == pytest.approx(scale, rel=1e-6) and one.rank == 4
        modules[flat[name]].weight.data += one.delta()
    torch.testing.assert_close(output(model), output(plain), rtol=1e-4, atol=1e-5)
    assert (output(model) - output(unet())).abs().max() > 1e-2


def test_rslora_of_peft_is_folded_into_alpha(unet):
    from peft import LoraConfig

    model = unet()
    model.add_adapter(LoraConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=["to_q"]))
    assert {one.alpha for one in extract(model, "unet").values()} == {6.0}


def test_extracted_tensors_are_copies_and_survive_training(unet):
    model = trained(unet())
    before = extract(model, "unet")
    randomise([p for p in model.parameters() if p.requires_grad], seed=5)
    assert not any(torch.equal(one.up, before[name].up) for name, one in extract(model, "unet").items())


def test_extract_sees_through_wrappers(unet):
    class Wrapped(torch.nn.Module):
        def __init__(self, model, name):
            super().__init__()
            setattr(self, name, model)

    model = trained(unet())
    for wrapped in (
        Wrapped(model, "module"),
        Wrapped(Wrapped(model, "_orig_mod"), "module"),
        Wrapped(Wrapped(model, "module"), "_orig_mod"),
    ):
        assert unwrap(wrapped) is model
        assert_equal_pairs(extract(wrapped, "unet"), extract(model, "unet"))
    assert extract(unet(), "unet") == {}


@pytest.mark.parametrize("use_dora", [False, True])
def test_insert_is_the_exact_inverse_of_extract(unet, tmp_path, use_dora):
    options = dict(targets="all", use_dora=use_dora, use_rslora=True, rank=3, alpha=0.7)
    first = trained(unet(), **options)
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(extract(first, "unet"), layout="diffusers", metadata={}))
    second = trained(unet(), seed=1, **options)
    parameters = [p for p in second.parameters() if p.requires_grad]
    assert not torch.equal(output(first), output(second))
    insert(second, "unet", read_lora(path).modules)
    assert_equal_pairs(extract(second, "unet"), extract(first, "unet"))
    assert torch.equal(output(first), output(second))
    assert [id(p) for p in parameters] == [id(p) for p in second.parameters() if p.requires_grad]


def test_insert_refuses_another_lora_and_changes_nothing(unet):
    model = trained(unet())
    before = extract(model, "unet")
    others = {
        "other modules": trained(unet(), targets="all"),
        "rank, alpha": trained(unet(), rank=2),
        "alpha": trained(unet(), alpha=4.0),
        "DoRA": trained(unet(), use_dora=True),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            insert(model, "unet", extract(other, "unet"))
        assert_equal_pairs(extract(model, "unet"), before)


def test_lora_disabled_gives_the_base_and_puts_everything_back(unet, text_encoder):
    base = output(unet())
    model, text = trained(unet()), trained(text_encoder())
    changed = output(model)
    flags = [p.requires_grad for p in model.parameters()]
    with lora_disabled(model, None, text):
        assert torch.equal(output(model), base) and torch.equal(output(text), output(text_encoder()))
        assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(output(model), changed) and not torch.equal(changed, base)


# ---- load_lora ----


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("alpha", "preset"), [(2.0, "attention"), (4.0, "attention"), (16.0, "attention+ff"), (2.0, "all")]
)
def test_a_loaded_file_gives_the_output_of_the_model_that_was_trained(
    unet, text_encoder, tmp_path, layout, alpha, preset
):
    models = (
        trained(unet(), targets=preset, alpha=alpha),
        trained(text_encoder(), targets=preset, alpha=alpha),
    )
    modules = extract(models[0], "unet") | extract(models[1], "text_encoder")
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(modules, layout=layout, metadata={}))
    fresh = unet().requires_grad_(False), text_encoder().requires_grad_(False)
    assert load_lora(path, *fresh, adapter_name="style") == len(modules)
    for model, loaded in zip(models, fresh, strict=True):
        assert torch.equal(output(model), output(loaded))
        assert not any(p.requires_grad for p in loaded.parameters())


def test_dora_and_mixed_ranks_load_exactly(unet):
    dora = trained(unet(), use_dora=True, targets="all")
    fresh = unet()
    load_lora(LoraFile(extract(dora, "unet"), {}, "diffusers"), fresh, adapter_name="a")
    assert torch.equal(output(dora), output(fresh))
    mixed = mixed_modules(unet())
    fresh = unet()
    load_lora(LoraFile(mixed, {}, "kohya"), fresh, adapter_name="a")
    assert_equal_pairs(extract(fresh, "unet", "a"), mixed)
    assert torch.equal(output(fresh), output(with_deltas(unet(), mixed))) is False
    torch.testing.assert_close(output(fresh), output(with_deltas(unet(), mixed)), rtol=1e-4, atol=1e-5)


def mixed_modules(model):
    """A LoRA whose ranks and alphas differ from module to module."""
    modules = extract(trained(model, targets="all"), "unet")
    return {
        name: LoraPair(one.down[: 1 + i % 4], one.up[:, : 1 + i % 4], 0.5 + i % 3)
        for i, (name, one) in enumerate(modules.items())
    }


def with_deltas(model, *weighted):
    layers = {kohya_name("unet", name): module for name, module in model.named_modules()}
    for modules in weighted:
        for name, one in modules.items():
            layers[name].weight.data += one.delta()
    return model


def test_a_second_lora_adds_to_the_first_and_weights_scale_each(unet):
    first = LoraFile(extract(trained(unet(), seed=1), "unet"), {}, "kohya")
    second = LoraFile(extract(trained(unet(), seed=2, targets="all"), "unet"), {}, "kohya")
    model = unet()
    load_lora(first, model, adapter_name="a", weight=0.5)
    load_lora(second, model, adapter_name="b", weight=-0.25)
    assert active_adapters(model) == ["a", "b"]
    scaled = [
        {name: LoraPair(one.down, one.up, one.alpha * weight) for name, one in file.modules.items()}
        for file, weight in ((first, 0.5), (second, -0.25))
    ]
    torch.testing.assert_close(output(model), output(with_deltas(unet(), *scaled)), rtol=1e-4, atol=1e-5)


def test_loading_beside_a_lora_in_training_leaves_its_gradients_flags_and_the_rng(unet):
    model = trained(unet())
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    state = torch.get_rng_state()
    load_lora(LoraFile(extract(model, "unet"), {}, "kohya"), model, adapter_name="copy")
    assert [id(p) for p in model.parameters() if p.requires_grad] == wanted
    assert torch.equal(state, torch.get_rng_state())


def test_linear_and_1x1_convolution_spellings_of_one_layer_both_load(unet):
    modules = extract(trained(unet(), targets=["proj_in"]), "unet")
    flat = {n: LoraPair(one.down.flatten(1), one.up.flatten(1), one.alpha) for n, one in modules.items()}
    assert next(iter(modules.values())).down.ndim == 4
    model = unet()
    load_lora(LoraFile(flat, {}, "kohya"), model, adapter_name="a")
    assert_equal_pairs(extract(model, "unet", "a"), modules)


def test_what_does_not_fit_is_refused_and_the_model_is_left_alone(unet, text_encoder):
    modules = extract(trained(unet()), "unet")
    text = extract(trained(text_encoder()), "text_encoder")
    stranger = next(iter(modules.values()))
    wide = {
        name: LoraPair(torch.ones(4, 1024), one.up, 4.0) if name.endswith("attn2_to_k") else one
        for name, one in modules.items()
    }
    dora = extract(trained(unet(), use_dora=True), "unet")
    half_dora = {name: (dora if i % 2 else modules)[name] for i, name in enumerate(modules)}
    transposed = {name: LoraPair(one.down, one.up[:5], one.alpha) for name, one in modules.items()}
    cases = [
        (
            modules | {"lora_unet_foo_bar": stranger},
            "1 of .* no place in this unet, such as lora_unet_foo_bar",
        ),
        ({"lora_unet_foo_bar": stranger}, "1 of 1 modules have no place"),
        (wide, "made for Stable Diffusion 2.x: .*attn2_to_k does not fit"),
        (transposed, "made for another base model"),
        (half_dora, "DoRA in a part of its modules"),
        (modules | text, "trains the text encoder too"),
    ]
    for pairs, message in cases:
        model = unet()
        with pytest.raises(UserError, match=message):
            load_lora(LoraFile(pairs, {}, "kohya"), model, adapter_name="a")
        assert torch.equal(output(model), output(unet())) and not hasattr(model, "peft_config")
    with pytest.raises(UserError, match="numbers its modules"):
        numbered = {f"lora_unet_#{i}": pair for i, pair in enumerate(modules.values())}
        load_lora(LoraFile(numbered, {}, "cloneofsimo"), unet(), adapter_name="a")
    load_lora(LoraFile(modules, {}, "cloneofsimo"), unet(), adapter_name="a")  # named by read_any: loads
    model = unet()
    load_lora(LoraFile(modules, {}, "kohya"), model, adapter_name="a")
    with pytest.raises(UserError, match="'a' is taken"):
        load_lora(LoraFile(modules, {}, "kohya"), model, adapter_name="a")


@pytest.mark.parametrize("seed", range(5))
def test_output_at_weight_zero_is_the_base_and_weights_are_linear_in_the_layer(unet, seed):
    modules = extract(trained(unet(), seed=seed, targets="all"), "unet")
    model = unet()
    load_lora(LoraFile(modules, {}, "kohya"), model, adapter_name="a", weight=0.0)
    assert torch.equal(output(model), output(unet()))
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(seed))
    base = layer(x)
    changes = OrderedDict()
    for weight in (1.0, 2.0, -1.0):
        layer.set_scale("a", weight)
        changes[weight] = layer(x) - base
    assert not math.isclose(float(changes[1.0].detach().abs().max()), 0.0)
    torch.testing.assert_close(changes[2.0], 2 * changes[1.0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changes[-1.0], -changes[1.0], rtol=1e-4, atol=1e-5)
