"""LoRA files of every layout met in the wild, read into the one form of lora_file.py or refused by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraFile, LoraPair, base_of, kohya_name, unflatten
from lorakit.weights.lora_metadata import AdapterAlphas, Component
from lorakit.weights.tensors import Shapes, read_header, read_tensors

if TYPE_CHECKING:
    import torch

_SLOTS = {
    "lora_down.weight": ("down", "kohya"),
    "lora_up.weight": ("up", "kohya"),
    "lora_A.weight": ("down", "diffusers"),
    "lora_B.weight": ("up", "diffusers"),
    "lora_magnitude_vector": ("magnitude", "diffusers"),
    "lora_magnitude_vector.weight": ("magnitude", "diffusers"),
    "lora.down.weight": ("down", "diffusers-old"),
    "lora.up.weight": ("up", "diffusers-old"),
    "lora_linear_layer.down.weight": ("down", "diffusers-old"),
    "lora_linear_layer.up.weight": ("up", "diffusers-old"),
    "alpha": ("alpha", ""),
}
_SLOT = "|".join(re.escape(slot) for slot in _SLOTS)
_KOHYA = re.compile(rf"lora_(unet|te1?)_([^.]+)\.({_SLOT})")
# `base_model.model.` comes from get_peft_model; `to_k_lora.down` from the old attention processors.
_DOTTED = re.compile(rf"(?:(unet|text_encoder)\.)?(?:base_model\.model\.)?(.+?)[._]({_SLOT})")
_SIMO = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_ROOTS: dict[Component, tuple[str, ...]] = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding."),
    "text_encoder": ("text_model.",),
}

_CHECKPOINT = r"^model\.diffusion_model\.|^cond_stage_model\."
_USE_SD = "use a file made for Stable Diffusion 1.x or 2.x"
_FOREIGN = (
    (r"\.(hada|lokr)_", "is a LoHa or LoKr file, not a LoRA; make a LoRA of it with `mix_lora.py convert`"),
    (r"\.dora_scale$", "holds DoRA in kohya's form, which tools read in two ways; use diffusers' form"),
    (
        r"^lora_te2_|^text_encoder_2\.|^conditioner\.|add_embedding"
        r"|^lora_unet_(input_blocks|middle_block|output_blocks)_",
        f"is for SDXL; {_USE_SD}",
    ),
    (
        r"^(transformer|diffusion_model)\.|^lora_transformer_|(double|single|joint)_(transformer_)?blocks",
        f"is for Flux, SD3 or another transformer; {_USE_SD}",
    ),
    (
        r"^lora_unet_(lora_)?unet_|^lora_te1?_lora_te1?_|^unet\.unet\.|^text_encoder\.text_encoder\.",
        "has names with a doubled prefix, as a conversion done twice leaves; take the original file",
    ),
)
_LOOKS_LIKE = (
    (_CHECKPOINT, "a full Stable Diffusion checkpoint"),
    (r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|mid)|quant_conv", "a VAE"),
    (r"^control_model\.|controlnet|^input_hint_block", "a ControlNet"),
    (r"motion_modules|temporal_transformer", "an AnimateDiff motion module"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$|^<.*>$", "a textual inversion embedding"),
    (r"^(down_blocks|up_blocks|mid_block)\.", "a U-Net"),
    (r"^(text_model\.)?(encoder\.layers|embeddings)\.", "a text encoder"),
)


def read_lora(path: Path | str) -> LoraFile:
    """Reads a LoRA file of any layout for SD 1.x and 2.x; a missing alpha means alpha = rank.

    Raises:
        UserError: one message that says what the file is and why it is refused.
        OutputError: it cannot be read.
    """
    path = Path(path)
    _refuse_foreign(path, read_header(path)[0])
    return lora_from_tensors(path, *read_tensors(path))


def lora_from_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> LoraFile:
    """What a file of these tensors and metadata holds; raises as `read_lora`, with `path` in messages."""
    _refuse_foreign(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    _refuse_bad_numbers(path, tensors)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    layouts, unknown = [], []
    for key in sorted(tensors):
        parsed = _parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        name, slot, layout = parsed
        if slot in parts.setdefault(name, {}):
            raise UserError(f"{path}: holds {slot} of {name} twice, under two spellings")
        parts[name][slot] = tensors[key]
        layouts += [layout] if layout else []
    if unknown:
        raise UserError(f"{path}: holds keys that belong to no known LoRA layout: {_some(unknown)}")
    try:
        alphas = AdapterAlphas(metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: its metadata on alpha cannot be read ({error}), so its strength is unknown"
        ) from error
    modules = {name: _pair(path, name, part, alphas) for name, part in parts.items()}
    if base_of(modules) == "SDXL":
        raise UserError(f"{path}: is for SDXL: its cross attention reads text of width 2048; {_USE_SD}")
    return LoraFile(modules, metadata, Counter(layouts).most_common(1)[0][0])


def _refuse_foreign(path: Path, shapes: Shapes) -> None:
    def any_key(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in shapes)

    if not shapes:
        raise UserError(f"{path}: holds no tensors")
    if not any_key(_CHECKPOINT):
        for pattern, what in _FOREIGN:
            if any_key(pattern):
                raise UserError(f"{path}: {what}")
    if not any(_parse_key(key) for key in shapes):
        likeness = next((f"; it looks like {what}" for pattern, what in _LOOKS_LIKE if any_key(pattern)), "")
        raise UserError(
            f"{path}: holds no LoRA for Stable Diffusion{likeness} (keys: {_some(sorted(shapes), 3)})"
        )


def _refuse_bad_numbers(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith("alpha"):
            raise UserError(f"{path}: {key} holds {tensor.dtype}; LoRA weights are floating point")
    bad = sorted(key for key, tensor in tensors.items() if not tensor.float().isfinite().all())
    if bad:
        raise UserError(f"{path}: holds NaN or infinity, so that images come out black: {_some(bad)}")


def _parse_key(key: str) -> tuple[str, str, str] | None:
    """(module's kohya name, slot, layout) of a tensor's key; None when it is none of a LoRA's."""
    if match := _SIMO.fullmatch(key):
        where, index, slot = match.groups()
        return f"{'lora_unet' if where == 'unet' else 'lora_te'}_#{index}", slot, "cloneofsimo"
    if match := _KOHYA.fullmatch(key):
        where, flat, slot = match.groups()
        if where == "unet":
            return f"lora_unet_{flat}", *_SLOTS[slot]
        # diffusers' exporter leaves `text_model_` out
        return f"lora_te_text_model_{flat.removeprefix('text_model_')}", *_SLOTS[slot]
    match = _DOTTED.fullmatch(key)
    if match is None:
        return None
    where, dotted, slot = match.groups()
    component = _component(where, dotted)
    if component is None:
        return None
    dotted = dotted.replace(".processor.", ".")
    if component == "unet":
        dotted = re.sub(r"\.to_out$", ".to_out.0", dotted)
    else:
        dotted = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", dotted)
    return kohya_name(component, dotted), *_SLOTS[slot]


def _component(where: str | None, dotted: str) -> Component | None:
    """From the key's first part or, where it has none, from what it names."""
    for component, roots in _ROOTS.items():
        if component == where or (where is None and dotted.startswith(roots)):
            return component
    return None


def _pair(path: Path, name: str, part: Mapping[str, torch.Tensor], alphas: AdapterAlphas) -> LoraPair:
    for half in ("down", "up"):
        if half not in part:
            raise UserError(f"{path}: {name} has no {half} weight; the file is incomplete")
    down, up, magnitude = part["down"], part["up"], part.get("magnitude")
    is_linear, is_conv = down.ndim == up.ndim == 2, down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
    if not (is_linear or is_conv) or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        sides = f"down {[*down.shape]}, up {[*up.shape]}"
        raise UserError(f"{path}: {name} has shapes that do not multiply: {sides}")
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise UserError(f"{path}: {name} has {magnitude.numel()} DoRA magnitudes for {up.shape[0]} outputs")
    if "alpha" in part and part["alpha"].numel() != 1:
        raise UserError(f"{path}: alpha of {name} is not one number")
    rank = down.shape[0]
    alpha = float(part["alpha"].item()) if "alpha" in part else alphas.alpha(*unflatten(name), rank)
    return LoraPair(down, up, alpha, magnitude)


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
