"""A written file is what was trained, as we read it and as diffusers does; and a wrong file is found out."""

import copy
import dataclasses
import logging
from itertools import product

import pytest
import torch

from lorakit.diffusion.lora import active_adapters, add_lora, extract, load_lora
from lorakit.ground.errors import OutputError, UserError
from lorakit.training.lora_check import verify_file, verify_in_diffusers
from lorakit.weights.lora_file import LoraFile, LoraPair, lora_bytes

LAYOUTS = ["kohya", "diffusers"]


@pytest.fixture(scope="module")
def bases(tiny_unet, tiny_text_encoder):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    return lambda: (copy.deepcopy(unet), copy.deepcopy(text_encoder))


def train(bases, with_text=True, **options):
    unet, text_encoder = bases()
    options = {"rank": 4, "alpha": 2.0} | options
    parameters = add_lora(unet, **options)
    parameters += add_lora(text_encoder, **options, seed=1) if with_text else []
    randomise(parameters)
    modules = extract(unet, "unet") | extract(text_encoder, "text_encoder")
    return unet, text_encoder if with_text else None, modules


def randomise(parameters):
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def write(tmp_path, modules, layout="kohya", dtype=None):
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(modules, layout=layout, dtype=dtype, metadata={}))
    return path


@pytest.mark.parametrize(
    ("layout", "alpha", "with_text", "preset"),
    [
        *product(LAYOUTS, [2.0, 4.0, 16.0], [True], ["attention"]),
        *product(LAYOUTS, [2.0], [True], ["attention+ff", "all"]),
        *product(LAYOUTS, [16.0], [False], ["attention", "attention+ff", "all"]),
    ],
)
def test_diffusers_reproduces_the_live_adapter_exactly(bases, tmp_path, layout, alpha, with_text, preset):
    unet, text_encoder, modules = train(bases, with_text, alpha=alpha, targets=preset)
    assert verify_in_diffusers(write(tmp_path, modules, layout), unet, text_encoder) == 0.0


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("diffusers", {"use_dora": True}),
        ("diffusers", {"use_dora": True, "use_rslora": True, "rank": 3}),
        ("kohya", {"use_rslora": True}),
        ("kohya", {"use_rslora": True, "rank": 3, "alpha": 0.7}),
        ("diffusers", {"use_rslora": True, "rank": 3, "alpha": 0.7}),
        ("kohya", {"alpha": 0.1, "rank": 3}),
    ],
)
def test_diffusers_reproduces_dora_and_rslora_exactly(bases, tmp_path, layout, options):
    unet, text_encoder, modules = train(bases, targets="all", **options)
    path = write(tmp_path, modules, layout)
    verify_file(path, modules, torch.float32)
    assert verify_in_diffusers(path, unet, text_encoder) == 0.0


def test_ranks_and_alphas_that_differ_between_modules_reach_diffusers_exactly(bases, tmp_path):
    _, _, modules = train(bases, targets="all")
    mixed = {
        name: LoraPair(one.down[: 1 + i % 4], one.up[:, : 1 + i % 4], 0.5 + i % 3)
        for i, (name, one) in enumerate(modules.items())
    }
    models = bases()
    load_lora(LoraFile(mixed, {}, "kohya"), *models, adapter_name="default")
    assert verify_in_diffusers(write(tmp_path, mixed, "diffusers"), *models) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lost_alpha_in_either_part_is_found(bases, tmp_path, layout, part):
    unet, text_encoder, modules = train(bases)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
    wrong = {n: dataclasses.replace(m, alpha=4.0) if n.startswith(prefix) else m for n, m in modules.items()}
    path = write(tmp_path, wrong, layout)
    assert verify_in_diffusers(path, unet, text_encoder) > 1e-3
    with pytest.raises(OutputError, match="is not what was trained"):
        verify_file(path, modules, torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_models_and_the_rng_as_they_were(bases, tmp_path, training):
    unet, text_encoder, modules = train(bases, dropout=0.1)
    models = unet.train(training), text_encoder.train(training)
    unet.mid_block.eval()
    path = write(tmp_path, modules)

    def state():
        return [
            (active_adapters(m), [x.training for x in m.modules()], [p.requires_grad for p in m.parameters()])
            for m in models
        ]

    before, rng = state(), torch.get_rng_state()
    names = [name for m in models for name, _ in m.named_parameters()]
    values = [(p, p.data_ptr()) for m in models for p in m.parameters()]
    verify_in_diffusers(path, *models)
    assert state() == before and torch.equal(rng, torch.get_rng_state())
    assert [name for m in models for name, _ in m.named_parameters()] == names
    assert all(p.data_ptr() == pointer for p, pointer in values)
    assert not any("reloaded" in m.peft_config for m in models)
    parameters = [p for m in models for p in m.parameters() if p.requires_grad]
    image = unet(torch.ones(1, 4, 8, 8), 300, torch.ones(1, 5, 16)).sample
    states = text_encoder(torch.arange(7)[None]).last_hidden_state
    (image.square().mean() + states.square().mean()).backward()
    assert all(p.grad is not None for p in parameters)


def test_float32_lora_weights_survive_a_half_precision_text_encoder(bases, tmp_path):
    unet, text_encoder = bases()
    text_encoder.to(torch.bfloat16)
    parameters = add_lora(text_encoder, rank=4, alpha=2.0) + add_lora(unet, rank=4, alpha=2.0)
    randomise(parameters)
    before = [p.clone() for p in parameters]
    modules = extract(unet, "unet") | extract(text_encoder, "text_encoder")
    assert verify_in_diffusers(write(tmp_path, modules), unet, text_encoder) < 0.1
    assert all(
        p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(parameters, before, strict=True)
    )


def test_nothing_is_logged_and_no_warning_is_raised(bases, tmp_path, caplog, recwarn, capfd):
    unet, text_encoder, modules = train(bases)
    path = write(tmp_path, modules)
    capfd.readouterr()
    recwarn.clear()
    with caplog.at_level(logging.INFO):
        verify_in_diffusers(path, unet, text_encoder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_a_text_encoder_that_the_file_adapts_must_be_given(bases, tmp_path):
    unet, _, modules = train(bases)
    with pytest.raises(UserError, match="also adapts the text_encoder"):
        verify_in_diffusers(write(tmp_path, modules), unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_file_passes_and_every_kind_of_difference_fails(bases, tmp_path, layout, dtype):
    _, _, modules = train(bases)
    path = write(tmp_path, modules, layout, dtype)
    verify_file(path, modules, dtype)
    first = next(iter(modules))
    one = modules[first]
    flipped = one.up.clone()
    flipped[0, 0] += 0.1
    for wrong in (
        {name: m for name, m in modules.items() if name != first},
        modules | {first: dataclasses.replace(one, up=flipped)},
        modules | {first: dataclasses.replace(one, alpha=one.alpha + 0.5)},
    ):
        with pytest.raises(OutputError):
            verify_file(path, wrong, dtype)
    with pytest.raises(OutputError):
        verify_file(path, modules, torch.float16 if dtype == torch.float32 else torch.float32)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OutputError, match="cannot be read back.*truncated"):
        verify_file(path, modules, dtype)
