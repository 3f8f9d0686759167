"""Checkpoints of the original code, read by their header."""

import narrow
import pytest
from safetensors.torch import load_file, save_file

from lorakit.weights.base import BaseError, inspect_base
from lorakit.weights.part_files import read_places

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def family(request, tmp_path_factory):
    """A family's name, and a folder with its base as today's libraries save it and as a single file."""
    root = tmp_path_factory.mktemp(request.param)
    for layout in ("modern", *narrow.FILES):
        narrow.write_base(root, layout, request.param)
    return request.param, root


def refused(path, **options) -> str:
    with pytest.raises(BaseError) as caught:
        inspect_base(str(path), **options)
    return str(caught.value)


# ---- names and numbers ----


@pytest.mark.parametrize("layout", narrow.FILES)
def test_a_file_has_the_tensors_of_a_folder(family, layout):
    import torch

    _, root = family
    folder = inspect_base(str(root / "modern"))
    file = inspect_base(str(root / f"{layout}.safetensors"), str(root / "modern"))
    assert file.parameters == folder.parameters and file.kind == "file" and file.known
    for part in PARTS:
        assert file.shapes(part) == folder.shapes(part)
        found, exact = dict(read_places(file.places(part))), dict(read_places(folder.places(part)))
        for name, tensor in exact.items():
            expected = tensor.half() if "half" in layout else tensor
            assert torch.equal(found[name], expected), name
        assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in found.values()}) > len(exact) // 4


def test_diffusers_reads_the_same_out_of_the_file(family):
    import torch
    from diffusers import StableDiffusionPipeline

    _, root = family
    options = {"config": str(root / "modern"), "safety_checker": None, "feature_extractor": None}
    theirs = StableDiffusionPipeline.from_single_file(str(root / "file.safetensors"), **options)
    ours = inspect_base(str(root / "file.safetensors"), str(root / "modern"))
    for part in PARTS:
        own = dict(read_places(ours.places(part)))
        state = getattr(theirs, part).state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(own[name], state[name]) for name in own)


def full_header(family: str, channels: int = 4) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint of the real size."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lorakit.weights.published import family_configs

    configs = family_configs(family)
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"] | {"in_channels": channels}),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        }
        tensors = narrow.original({part: model.state_dict() for part, model in models.items()}, family)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("family", "parameters", "width"), [("sd1", 1_066_235_307, 768), ("sd2", 1_289_952_427, 1024)]
)
def test_a_file_of_the_real_size_is_described_without_any_other(tmp_path, family, parameters, width):
    info = inspect_base(str(narrow.write_header(tmp_path / "base.safetensors", full_header(family))))
    assert sum(info.parameters.values()) == parameters
    assert (info.cross_attention_dim, info.vae_factor, info.max_tokens) == (width, 8, 77)
    assert (info.resolution, info.prediction_type) == {
        "sd1": (512, "epsilon"),
        "sd2": (768, "v_prediction"),
    }[family]
    assert info.pad_token == ("!" if family == "sd2" else "<|endoftext|>")


# ---- epsilon or v ----

YAML_V = 'model:\n  params:\n    parameterization: "v"\n    unet_config: {}\n'
TOLD = {
    "nothing": ("", {}, None, "v_prediction", 768, 1),
    "a config for v": (YAML_V, {}, None, "v_prediction", 768, 0),
    "a config without a word": (YAML_V.replace("parameterization", "# other"), {}, None, "epsilon", 512, 0),
    "a file that is no config": ("notes: v\n", {}, None, "v_prediction", 768, 1),
    "metadata": ("", {"modelspec.prediction_type": "epsilon"}, None, "epsilon", 512, 0),
    "metadata of the architecture": (
        *("", {"modelspec.architecture": "stable-diffusion-v2-512"}),
        *(None, "epsilon", 512, 0),
    ),
    "the user": (YAML_V, {}, "epsilon", "epsilon", 512, 0),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_a_file_of_2x_predicts(tmp_path, case):
    yaml, metadata, key, expected, resolution, notes = TOLD[case]
    path = narrow.write_header(tmp_path / "base.safetensors", full_header("sd2"), metadata)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    info = inspect_base(str(path), prediction_type=key)
    assert (info.prediction_type, info.resolution, len(info.notes)) == (expected, resolution, notes)
    assert all("set prediction_type=epsilon" in note for note in info.notes)
    assert info.configs["scheduler"]["prediction_type"] == expected


# ---- what is no base ----

UNET = {f"model.diffusion_model.{name}": [1] for name in ("input_blocks.0.0.weight", "out.2.weight")}
VAE = {"first_stage_model.decoder.conv_in.weight": [1], "first_stage_model.encoder.conv_in.weight": [1]}
TEXT = {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": [1]}
OTHERS = {
    "LoRA of kohya's": ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": [1]}, ["is a LoRA"]),
    "LoRA of PEFT's": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": [1]}, ["is a LoRA"]),
    "LoRA by number": ({"unet:0:up": [1]}, ["is a LoRA", "beside its base"]),
    "LoKr": ({"lycoris_mid_block.lokr_w1": [1]}, ["is a LoRA"]),
    "embedding": ({"emb_params": [2, 768]}, ["textual inversion"]),
    "VAE": ({"encoder.conv_in.weight": [1], "decoder.conv_in.weight": [1]}, ["autoencoder (VAE) alone"]),
    "VAE of the original code": (VAE, ["autoencoder (VAE) alone"]),
    "U-Net": ({"down_blocks.0.resnets.0.conv1.weight": [1]}, ["a U-Net alone", "whole checkpoint"]),
    "U-Net of the original code": (UNET, ["a U-Net alone"]),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": [1]}, ["text encoder alone"]),
    "no VAE": (UNET | TEXT, ["without its autoencoder"]),
    "no text encoder": (UNET | VAE, ["without its text encoder"]),
    "ControlNet": (
        {"control_model.time_embed.0.weight": [1]},
        ["is a ControlNet", "controlnet in style_transfer.py"],
    ),
    "ControlNet of diffusers": ({"controlnet_cond_embedding.conv_in.weight": [1]}, ["is a ControlNet"]),
    "motion": ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": [1]}, ["motion module"]),
    "SDXL": (UNET | VAE | {"conditioner.embedders.0.transformer.weight": [1]}, ["an SDXL checkpoint"]),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": [1]}, ["Stable Diffusion 3"]),
    "Flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": [1]}, ["Flux"]),
    "anything": ({"a": [1]}, ["no Stable Diffusion checkpoint"]),
    "nothing": ({}, ["no Stable Diffusion checkpoint"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_kind_of_file_is_refused_by_its_name(tmp_path, case):
    shapes, words = OTHERS[case]
    message = refused(narrow.write_header(tmp_path / "other.safetensors", shapes))
    assert str(tmp_path / "other.safetensors") in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("channels", "name"),
    [(9, "an inpainting model"), (5, "a depth model"), (8, "instructions"), (7, "an upscaler")],
)
def test_a_model_that_reads_more_than_latents_is_refused_by_its_name(tmp_path, channels, name):
    for path in (
        narrow.write_header(tmp_path / "base.safetensors", full_header("sd1", channels)),
        narrow.write_base(tmp_path, "modern", in_channels=channels),
    ):
        message = refused(path)
        assert f"is {name}" in message or name in message
        assert f"reads {channels} channels, where latents have 4" in message and str(path) in message


@pytest.mark.slow
def test_a_narrow_file_asks_for_its_configs(family):
    _, root = family
    message = refused(root / "file.safetensors")
    assert "begins with 8 channels and reads text 16 wide" in message and "base_config" in message


# ---- base_config ----


def test_a_base_config_that_is_not_there_or_has_no_use_is_refused(family, tmp_path):
    _, root = family
    assert "base_config nowhere: no such folder" in refused(root / "file.safetensors", base_config="nowhere")
    assert "leave base_config out" in refused(root / "modern", base_config=str(root / "modern"))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    assert "vae/config.json: missing" in refused(root / "file.safetensors", base_config=str(tmp_path))


def test_a_base_config_of_another_base_is_refused(family, tmp_path):
    _, root = family
    other = narrow.write_base(tmp_path, "modern", block_out_channels=(4, 8, 16, 16))
    message = refused(root / "file.safetensors", base_config=str(other))
    assert "unet/config.json: block_out_channels is 4, but 8 in the weights" in message


def test_a_tensor_that_is_missing_is_named(family, tmp_path):
    _, root = family
    tensors = load_file(root / "file.safetensors")
    del tensors["first_stage_model.encoder.conv_in.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    assert "encoder.conv_in.weight" in refused(tmp_path / "cut.safetensors", base_config=str(root / "modern"))
