"""Every layout of LoRA files in the wild reads into one form, and what is no usable LoRA is named."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit.ground.errors import DivergedError, UserError
from lorakit.weights.lora_file import LoraPair, base_of, kohya_name, lora_bytes, unflatten
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.tensors import payload_sha256, serialize

ROOT = Path(__file__).resolve().parents[2]

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {  # dotted name -> shapes of down and up, rank 4
    f"{BLOCK}.attn1.to_q": ((4, 8), (8, 4)),
    f"{BLOCK}.attn2.to_k": ((4, 768), (8, 4)),
    f"{BLOCK}.attn2.to_out.0": ((4, 8), (8, 4)),
    f"{BLOCK}.ff.net.0.proj": ((4, 8), (64, 4)),
    "mid_block.attentions.0.proj_in": ((4, 16, 1, 1), (16, 4, 1, 1)),
    "down_blocks.0.downsamplers.0.conv": ((4, 8, 3, 3), (8, 4, 1, 1)),
    "up_blocks.1.resnets.0.time_emb_proj": ((4, 32), (8, 4)),
    "conv_in": ((4, 4, 3, 3), (8, 4, 1, 1)),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": ((4, 16), (16, 4)),
    "text_model.encoder.layers.11.mlp.fc1": ((4, 16), (32, 4)),
}


def pair(shapes, seed, alpha=2.0, dtype=torch.float32, magnitude=False):
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return LoraPair(down, up, alpha, torch.rand(up.shape[0], generator=generator) if magnitude else None)


def modules(alpha=2.0, dtype=torch.float32, magnitude=False, text=True):
    named = [("unet", name, shapes) for name, shapes in UNET.items()]
    named += [("text_encoder", name, shapes) for name, shapes in TEXT.items()] if text else []
    return {
        kohya_name(component, name): pair(shapes, seed, alpha, dtype, magnitude)
        for seed, (component, name, shapes) in enumerate(named)
    }


def written(tmp_path, tensors, metadata=None, name="x.safetensors"):
    path = tmp_path / name
    path.write_bytes(serialize(tensors, metadata or {}))
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].alpha == pytest.approx(wanted.alpha, rel=1e-7), name
        assert found[name].tensors().keys() == wanted.tensors().keys()
        for slot, tensor in wanted.tensors().items():
            assert found[name].tensors()[slot].dtype == tensor.dtype
            assert torch.equal(found[name].tensors()[slot], tensor), (name, slot)


def kohya_tensors(pairs, unet="lora_unet_", text="lora_te_", with_alpha=True):
    tensors = {}
    for name, one in pairs.items():
        name = name.replace("lora_unet_", unet).replace("lora_te_", text)
        tensors |= {f"{name}.lora_down.weight": one.down, f"{name}.lora_up.weight": one.up}
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(one.alpha)
    return tensors


# ---- names and numbers ----


def test_names_go_both_ways_for_whole_models(tiny_unet, tiny_text_encoder):
    count = 0
    for component, model in (("unet", tiny_unet()), ("text_encoder", tiny_text_encoder())):
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                dotted = name if component == "unet" else f"text_model.{name}"
                assert unflatten(kohya_name(component, name)) == (component, dotted)
                count += 1
    assert count > 60


def test_text_encoder_names_are_one_with_and_without_text_model():
    name = "encoder.layers.0.mlp.fc1"
    assert kohya_name("text_encoder", name) == kohya_name("text_encoder", f"text_model.{name}")
    assert kohya_name("text_encoder", name) == "lora_te_text_model_encoder_layers_0_mlp_fc1"


def test_delta_is_the_scaled_product_for_linear_layers_and_convolutions():
    linear = pair(((4, 8), (6, 4)), 0, alpha=2.0)
    torch.testing.assert_close(linear.delta(), 0.5 * linear.up @ linear.down, rtol=1e-6, atol=1e-6)
    conv = pair(((4, 3, 3, 3), (6, 4, 1, 1)), 1, alpha=8.0)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    two_steps = 2.0 * torch.conv2d(torch.conv2d(x, conv.down), conv.up)
    torch.testing.assert_close(torch.conv2d(x, conv.delta()), two_steps, rtol=1e-4, atol=1e-4)


def test_the_base_is_told_by_the_width_of_its_text():
    name = kohya_name("unet", f"{BLOCK}.attn2.to_k")
    widths = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 16: None}
    assert {width: base_of({name: pair(((4, width), (8, 4)), 0)}) for width in widths} == widths
    assert base_of({}) is None


# ---- writing ----


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("alpha", [0.1, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_layouts_come_back_exactly(tmp_path, layout, alpha, dtype):
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(modules(alpha), layout=layout, dtype=dtype, metadata={"ss_x": "y"}))
    file = read_lora(path)
    assert file.layout == layout and file.metadata["ss_x"] == "y"
    expected = {
        name: LoraPair(one.down.to(dtype), one.up.to(dtype), alpha) for name, one in modules(alpha).items()
    }
    assert_same(file.modules, expected)


def test_mixed_ranks_and_alphas_come_back_in_the_diffusers_layout(tmp_path):
    mixed = modules()
    mixed[kohya_name("unet", "conv_in")] = pair(((2, 4, 3, 3), (8, 2, 1, 1)), 9, alpha=7.5)
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(mixed, layout="diffusers", metadata={}))
    assert_same(read_lora(path).modules, mixed)


def test_dora_is_written_for_diffusers_and_refused_for_kohya(tmp_path):
    dora = modules(magnitude=True)
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(dora, layout="diffusers", metadata={}))
    assert_same(read_lora(path).modules, dora)
    with pytest.raises(UserError, match="DoRA cannot be written in the kohya layout"):
        lora_bytes(dora, layout="kohya", metadata={})
    with pytest.raises(UserError, match="depends on the base weight"):
        next(iter(dora.values())).delta()


@pytest.fixture(scope="module")
def there() -> dict[str, str]:
    """The hash that another process finds in each layout."""
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests/weights'); import test_lora_file as t;"
        "modules = dict(reversed(t.modules().items()));"
        "metadata = {f'ss_{i}': str(i) for i in reversed(range(9))};"
        "made = [t.lora_bytes(modules, layout=each, metadata=metadata) for each in ('kohya', 'diffusers')];"
        "print(*(hashlib.sha256(data).hexdigest() for data in made))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return dict(zip(("kohya", "diffusers"), out.split(), strict=True))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_bytes_are_the_same_twice_and_in_another_process(layout, there):
    metadata = {f"ss_{i}": str(i) for i in range(9)}
    here = [lora_bytes(modules(), layout=layout, metadata=metadata) for _ in range(2)]
    assert here[0] == here[1]
    assert hashlib.sha256(here[0]).hexdigest() == there[layout]


def test_the_hashes_are_those_of_the_tensor_bytes(tmp_path):
    data = lora_bytes(modules(), layout="kohya", metadata={})
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    size = int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[8 + size :]).hexdigest()
    metadata = read_lora(path).metadata
    assert digest == payload_sha256(data) == metadata["sshs_model_hash"]
    assert metadata["modelspec.hash_sha256"] == "0x" + digest


def test_numbers_that_are_not_finite_are_never_written():
    for bad in (float("nan"), float("inf"), 1e6):
        broken = modules()
        next(iter(broken.values())).up[0, 0] = bad
        with pytest.raises(DivergedError, match="lora_.*NaN or infinity"):
            lora_bytes(broken, layout="kohya", dtype=torch.float16, metadata={})
    assert lora_bytes(broken, layout="kohya", dtype=torch.float32, metadata={})  # 1e6 overflows float16 only
    with pytest.raises(UserError, match="no LoRA module"):
        lora_bytes({}, layout="kohya", metadata={})


def test_kohya_keys_follow_the_rules_of_comfyui_and_a1111(tmp_path, tiny_unet, tiny_text_encoder):
    """ComfyUI: every weight of the diffusers U-Net as lora_unet_ with `_` for dots; CLIP layers by number
    and part. A1111: blocks by kind and number, then the part. Every down has its up and its alpha.
    """
    names = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    pairs = {
        kohya_name(component, name): pair(((4, 8), (8, 4)), 0)
        for component, model in names.items()
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(pairs, layout="kohya", metadata={}))
    weights = [key.removesuffix(".weight") for key in tiny_unet().state_dict() if key.endswith(".weight")]
    comfy = {"lora_unet_" + weight.replace(".", "_") for weight in weights}
    parts = "self_attn_q_proj self_attn_k_proj self_attn_v_proj self_attn_out_proj mlp_fc1 mlp_fc2".split()
    comfy |= {f"lora_te_text_model_encoder_layers_{i}_{part}" for i in range(32) for part in parts}
    a1111 = re.compile(
        r"lora_unet_(conv_in|conv_out|time_embedding_linear_\d+"
        r"|(down|up)_blocks_\d+_(attentions|resnets)_\d+_\w+|mid_block_(attentions|resnets)_\d+_\w+"
        r"|down_blocks_\d+_downsamplers_0_conv|up_blocks_\d+_upsamplers_0_conv)"
        r"|lora_te_text_model_encoder_layers_\d+_(self_attn|mlp)_\w+"
    )
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    keys = json.loads(header).keys() - {"__metadata__"}
    found = {key.split(".")[0] for key in keys}
    assert found == pairs.keys() and found <= comfy
    assert all(a1111.fullmatch(name) for name in found)
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert keys == {f"{name}.{end}" for name in found for end in ends}


def test_diffusers_keys_have_the_text_model_that_other_tools_expect(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(modules(), layout="diffusers", metadata={}))
    data = path.read_bytes()
    keys = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).keys() - {"__metadata__"}
    dotted = [f"unet.{name}" for name in UNET] + [f"text_encoder.{name}" for name in TEXT]
    assert keys == {f"{name}.lora_{half}.weight" for name in dotted for half in "AB"}


# ---- reading ----


def old_key(component, dotted, half):
    """The keys that diffusers wrote before it used PEFT."""
    if component == "text_encoder":
        return f"text_encoder.{dotted}.lora_linear_layer.{half}.weight"
    if match := re.fullmatch(r"(.*attn\d)\.(to_[qkv]|to_out)(\.0)?", dotted):
        return f"unet.{match[1]}.processor.{match[2]}_lora.{half}.weight"
    return f"unet.{dotted}.lora.{half}.weight"


@pytest.mark.parametrize("prefix", [True, False])
def test_the_old_attention_processors_of_diffusers_are_read(tmp_path, prefix):
    expected = modules(alpha=4.0, text=prefix)
    tensors = {}
    for name, one in expected.items():
        for half, tensor in (("down", one.down), ("up", one.up)):
            tensors[old_key(*unflatten(name), half).removeprefix("" if prefix else "unet.")] = tensor
    assert any(".processor.to_out_lora." in key for key in tensors)
    file = read_lora(written(tmp_path, tensors))
    assert file.layout == "diffusers-old"
    assert_same(file.modules, expected)


def test_old_text_encoder_keys_by_projection_are_read(tmp_path):
    one = pair(((4, 16), (16, 4)), 0, alpha=4.0)
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora"
    file = read_lora(written(tmp_path, {f"{stem}.down.weight": one.down, f"{stem}.up.weight": one.up}))
    assert_same(file.modules, {"lora_te_text_model_encoder_layers_0_self_attn_out_proj": one})


@pytest.mark.parametrize("text", ["lora_te_", "lora_te1_"])
@pytest.mark.parametrize("text_model", ["text_model_", ""])
def test_kohya_spellings_of_the_text_encoder_are_read(tmp_path, text, text_model):
    tensors = kohya_tensors(modules(), text=text)
    tensors = {key.replace("text_model_", text_model): tensor for key, tensor in tensors.items()}
    assert_same(read_lora(written(tmp_path, tensors)).modules, modules())


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("text_model", ["text_model.", ""])
def test_peft_spellings_are_read(tmp_path, prefix, text_model):
    tensors = {}
    for name, one in modules(alpha=4.0).items():
        component, dotted = unflatten(name)
        stem = f"{component}.{prefix}{dotted}".replace("text_model.", text_model)
        tensors |= {f"{stem}.lora_A.weight": one.down, f"{stem}.lora_B.weight": one.up}
    file = read_lora(written(tmp_path, tensors))
    assert file.layout == "diffusers"
    assert_same(file.modules, modules(alpha=4.0))


def test_without_alpha_the_scale_is_one(tmp_path):
    file = read_lora(written(tmp_path, kohya_tensors(modules(), with_alpha=False)))
    assert all(one.scale == 1.0 for one in file.modules.values())


def test_the_positional_layout_is_read_with_stable_names(tmp_path):
    tensors = {}
    for part in ("unet", "text_encoder"):
        for index in range(12):
            tensors |= {f"{part}:{index}:down": torch.ones(4, 8), f"{part}:{index}:up": torch.ones(8, 4)}
    file = read_lora(written(tmp_path, tensors))
    assert file.layout == "cloneofsimo"
    assert set(file.modules) == {f"{prefix}_#{i}" for prefix in ("lora_unet", "lora_te") for i in range(12)}


PAIR = {"down": torch.ones(4, 8), "up": torch.ones(8, 4)}
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def kohya(name, down=PAIR["down"], up=PAIR["up"]):
    return {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1") | kohya(Q), "is for SDXL"),
        (kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"), "is for SDXL"),
        (kohya(Q.replace("attn1_to_q", "attn2_to_k"), torch.ones(4, 2048)), "is for SDXL.*2048"),
        ({"conditioner.embedders.0.x.weight": torch.ones(2)}, "is for SDXL"),
        (kohya("lora_unet_double_blocks_0_img_attn_qkv"), "is for Flux"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}, "is for Flux"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, "LoHa or LoKr.*mix_lora.py convert"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "LoHa or LoKr.*mix_lora.py convert"),
        (kohya(Q) | {f"{Q}.dora_scale": torch.ones(8, 1)}, "DoRA in kohya's form"),
        ({"unet.unet.mid_block.x.lora_A.weight": torch.ones(4, 8)}, "mid_block_x has no up weight"),
        ({f"{Q}.lora_down.weight": PAIR["down"]}, f"{Q} has no up weight"),
        ({f"{Q}.lora_up.weight": PAIR["up"]}, f"{Q} has no down weight"),
        (kohya(Q) | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "lora_unet_conv_in has no down"),
        (kohya(Q, up=torch.ones(8, 5)), r"down \[4, 8\], up \[8, 5\]"),
        (kohya(Q, torch.ones(4, 8, 3, 3)), "shapes that do not multiply"),
        (kohya(Q, torch.ones(0, 8), torch.ones(8, 0)), "shapes that do not multiply"),
        (kohya(Q) | {f"{Q}.alpha": torch.ones(2)}, "alpha of .* not one number"),
        (kohya(Q, torch.full((4, 8), float("nan"))), "NaN or infinity.*lora_down"),
        (kohya(Q) | {f"{Q}.alpha": torch.tensor(float("inf"))}, "NaN or infinity.*alpha"),
        (kohya(Q, torch.ones(4, 8, dtype=torch.int8)), "torch.int8"),
        (kohya(Q) | {f"{Q}.lora_mid.weight": torch.ones(2)}, "no known LoRA layout: .*lora_mid"),
        (kohya(Q) | {f"extra{i}": torch.ones(1) for i in range(9)}, "extra0, .*extra4 and 4 more"),
        (
            kohya("lora_te_text_model_encoder_layers_0_mlp_fc1")
            | kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            "twice, under two spellings",
        ),
        ({"model.diffusion_model.x.weight": torch.ones(1)}, "looks like a full Stable Diffusion checkpoint"),
        ({"model.diffusion_model.x": torch.ones(1), "conditioner.x": torch.ones(1)}, "a full Stable"),
        ({"decoder.conv_in.weight": torch.ones(1)}, "looks like a VAE"),
        ({"emb_params": torch.ones(1)}, "looks like a textual inversion"),
        ({"control_model.x": torch.ones(1)}, "looks like a ControlNet"),
        ({"down_blocks.0.attentions.0.proj_in.weight": torch.ones(1)}, "looks like a U-Net"),
        ({"text_model.encoder.layers.0.x": torch.ones(1)}, "looks like a text encoder"),
        ({"something": torch.ones(1)}, r"holds no LoRA for Stable Diffusion \(keys: something\)"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(4, 8)}, "holds no LoRA for Stable"),
        ({}, "holds no tensors"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_message(tmp_path, tensors, message):
    path = written(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_parts_of_the_refused_files_are_accepted_when_whole(tmp_path):
    assert set(read_lora(written(tmp_path, kohya(Q))).modules) == {Q}


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}'])
def test_adapter_metadata_that_hides_the_strength_is_refused(tmp_path, text):
    tensors = {
        f"unet.conv_in.lora_{half}.weight": tensor for half, tensor in zip("AB", PAIR.values(), strict=True)
    }
    assert read_lora(written(tmp_path, tensors)).modules["lora_unet_conv_in"].alpha == 4
    with pytest.raises(UserError, match="strength is unknown"):
        read_lora(written(tmp_path, tensors, {"lora_adapter_metadata": text}))
