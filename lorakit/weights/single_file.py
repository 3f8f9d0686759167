"""A single-file checkpoint of the original code, as A1111 and ComfyUI use it, by its header. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.weights.base_checks import other_task
from lorakit.weights.original_names import PREFIXES, names_of
from lorakit.weights.part_files import BaseError, Place, Places
from lorakit.weights.published import FAMILIES, family_configs
from lorakit.weights.tensors import Shapes, read_header

Configs = dict[str, dict[str, Any]]

_UNET = PREFIXES["unet"]
FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"
_TEXT_READER = re.compile(rf"{re.escape(_UNET)}.*\.attn2\.to_k\.weight")
# What else a safetensors file can be: a pattern of a name, what it is, the remedy. The first counts.
_TAKE = "take one of Stable Diffusion 1.x or 2.x"
_OTHERS = (
    (
        r".*lora.*|.*\.(hada_w|lokr_w|oft_).*|(unet|text_encoder):\d+:.*",
        "is a LoRA, not a base",
        "give it as a LoRA beside its base: a diffusers folder, a checkpoint or a hub id",
    ),
    (r"emb_params|string_to_param.*", "is a textual inversion, not a base", "name a base"),
    (
        r"control_model\..*|(controlnet_cond_embedding|input_hint_block|zero_convs)\..*",
        "is a ControlNet",
        "give it as controlnet in style_transfer.py, beside a base",
    ),
    (r".*temporal_transformer\..*", "is a motion module, not a base", "name a base"),
    (r"conditioner\.embedders\..*", "is an SDXL checkpoint", _TAKE),
    (
        r".*joint_blocks\..*",
        "is a checkpoint of Stable Diffusion 3",
        _TAKE,
    ),
    (
        r"(.*\.)?(double_blocks|single_transformer_blocks)\..*",
        "is a checkpoint of Flux or its kin",
        _TAKE,
    ),
)
_PARTS_ALONE = (
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up).*", "is an autoencoder (VAE) alone"),
    (r"(down_blocks|up_blocks|mid_block)\..*|model\.diffusion_model\..*", "is a U-Net alone"),
    (r"(cond_stage_model\.transformer\.)?(text_model\.)?encoder\.layers\..*", "is a text encoder alone"),
)


def what_else(shapes: Shapes) -> str | None:
    """What a file holds that is no checkpoint of Stable Diffusion 1.x or 2.x, with the remedy; else None."""
    for pattern, what, remedy in _OTHERS:
        if any(re.fullmatch(pattern, key) for key in shapes):
            return f"{what}; {remedy}"
    present = {part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in shapes)}
    if present == set(PREFIXES) and FIRST_CONVOLUTION in shapes:
        latents = shapes.get(f"{PREFIXES['vae']}post_quant_conv.weight", shapes[FIRST_CONVOLUTION])[1]
        return other_task(shapes[FIRST_CONVOLUTION][1], latents)
    if {"unet", "vae"} <= present or {"unet", "text_encoder"} <= present:
        lost = {"vae": "autoencoder (VAE)", "text_encoder": "text encoder"}[({*PREFIXES} - present).pop()]
        return f"is a checkpoint without its {lost}; take one that has it"
    for pattern, what in _PARTS_ALONE:
        if any(re.fullmatch(pattern, key) for key in shapes):
            return f"{what}; take the whole checkpoint, or the folder that it is from"
    return "holds no Stable Diffusion checkpoint; name the file of one, or a diffusers folder"


def published_configs(path: Path, shapes: Shapes, prediction_type: str | None) -> tuple[Configs, list[str]]:
    """The configs that were published with a checkpoint's family, and what had to be guessed.

    Raises:
        BaseError: it is of no family of Stable Diffusion 1.x or 2.x.
    """
    width = next((shape[1] for key, shape in shapes.items() if _TEXT_READER.fullmatch(key)), 0)
    is_open_clip = any(key.startswith("cond_stage_model.model.") for key in shapes)
    family = "sd2" if is_open_clip or width == 1024 else "sd1"
    configs, notes = family_configs(family), []
    told = prediction_type or _told_prediction(path)
    if told is None and family == "sd2":
        notes.append(
            f"{path}: does not tell whether it predicts v (2.x for 768 px) or epsilon (for 512 px): v is "
            "taken; if pictures come out as noise, set prediction_type=epsilon"
        )
    if told:
        configs["scheduler"]["prediction_type"] = told
    if told == "epsilon":
        configs["unet"]["sample_size"] = 64
    own = configs["unet"]["block_out_channels"][0], configs["unet"]["cross_attention_dim"]
    found = shapes[FIRST_CONVOLUTION][0], width
    if own != found:
        raise BaseError(
            f"{path}: its U-Net begins with {found[0]} channels and reads text {found[1]} wide, "
            f"{FAMILIES[family]} has {own[0]} and {own[1]}: give the folder of its configs as base_config"
        )
    return configs, notes


def _told_prediction(path: Path) -> str | None:
    """What a checkpoint predicts, by the .yaml beside it or its metadata."""
    for suffix in (".yaml", ".yml"):
        config = path.with_suffix(suffix)
        if config.is_file():
            text = config.read_text(encoding="utf-8", errors="replace")
            if (
                "unet_config" in text
            ):  # a config of the original code, where v is named and epsilon the default
                is_v = re.search(r"""^\s*parameterization:\s*["']?v\b""", text, re.MULTILINE)
                return "v_prediction" if is_v else "epsilon"
    metadata = read_header(path)[1]
    words = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    if told := words.get(metadata.get("modelspec.prediction_type", "").lower()):
        return told
    if found := re.match(r"stable-diffusion-v2-(768-v|512)", metadata.get("modelspec.architecture", "")):
        return "v_prediction" if found[1] == "768-v" else "epsilon"
    return None


def file_places(path: Path, part: str, shapes: Shapes, configs: Mapping[str, Mapping[str, Any]]) -> Places:
    """Where each tensor of a part lies in a checkpoint, by its name of today."""
    found = {}
    for key, shape in shapes.items():
        names = names_of(part, key, configs)
        for third, name in enumerate(names):
            if len(names) > 1:
                found[name] = Place(path, key, (shape[0] // len(names), *shape[1:]), third)
            else:
                found[name] = Place(path, key, _plain_shape(part, name, shape, configs))
    return found


def _plain_shape(part: str, name: str, shape: tuple[int, ...], configs) -> tuple[int, ...]:
    """A 1x1 convolution of the original code where diffusers has a matrix, as a matrix."""
    is_linear = part == "vae" or configs["unet"].get("use_linear_projection")
    is_pointwise = len(shape) == 4 and shape[2:] == (1, 1)
    return shape[:2] if is_pointwise and is_linear and ".attentions." in name else shape
