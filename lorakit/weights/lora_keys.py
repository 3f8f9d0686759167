"""Keys of LoRA files in every spelling met in the wild: which module of which model, which tensor of it."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from lorakit.weights.lora_file import kohya_name, split_name, unflatten
from lorakit.weights.lora_metadata import Component
from lorakit.weights.original_names import motion_name, unet_name

_SLOTS = {
    "lora_down.weight": ("down", "kohya"),
    "lora_up.weight": ("up", "kohya"),
    "lora_mid.weight": ("mid", "kohya"),
    "lora_A.weight": ("down", "diffusers"),
    "lora_B.weight": ("up", "diffusers"),
    "lora_magnitude_vector": ("magnitude", "diffusers"),
    "lora_magnitude_vector.weight": ("magnitude", "diffusers"),
    "lora.down.weight": ("down", "diffusers-old"),
    "lora.up.weight": ("up", "diffusers-old"),
    "lora_linear_layer.down.weight": ("down", "diffusers-old"),
    "lora_linear_layer.up.weight": ("up", "diffusers-old"),
    "alpha": ("alpha", ""),
    "diff": ("diff", "whole"),
    "diff_b": ("diff_b", "whole"),
    "w_norm": ("diff", "whole"),
    "b_norm": ("diff_b", "whole"),
}
_PRODUCT = r"(?:hada_[wt][12]|lokr_[wt][12])(?:_[ab])?"
_SLOT = "|".join(re.escape(slot) for slot in sorted(_SLOTS, key=len, reverse=True)) + f"|{_PRODUCT}"
# `to_k_lora.down` is of the old attention processors.
_KEY = re.compile(rf"(.+?)(?:\.({_SLOT})|_(lora\.(?:down|up)\.weight))")
_ADAPTER = re.compile(
    rf"(.+\.(?:lora_[AB]|lora_magnitude_vector|{_PRODUCT}))\.(?!weight$)([^.]+?)(\.weight)?"
)
_SIMO = re.compile(r"(unet|text_encoder):(\d+):(up|down)")

_FLAT = re.compile(r"(lora|lycoris)_(.+)")
_FLAT_PREFIX = re.compile(r"(?:(lora)_)?(unet|te1?)_")
_PREFIX = re.compile(
    r"(unet|diffusion_model|text_encoders\.clip_l\.transformer|text_encoder|base_model\.model|module|_orig_mod)\."
)
_COMPONENTS: dict[str, Component] = {
    "unet": "unet",
    "diffusion_model": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "text_encoder": "text_encoder",
    "text_encoders.clip_l.transformer": "text_encoder",
}
_ROOTS: dict[Component, re.Pattern[str]] = {
    "unet": re.compile(
        r"(down_blocks|up_blocks)[._]\d+[._]|mid_block[._]|(conv_in|conv_out|conv_norm_out)$|time_embedding[._]"
    ),
    "text_encoder": re.compile(
        r"(text_model[._])?(encoder[._]layers[._]\d+[._]|embeddings[._]|final_layer_norm$)"
    ),
}
# The original code's names, which ComfyUI keeps.
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|out)[._]\d")
_ORIGINAL_BLOCK = re.compile(r"(?:^|[._])(?:input_blocks|middle_block|output_blocks|label_emb)[._]")
_ONLY_SDXL = re.compile(
    r"label_emb|(input|output|middle)_blocks?[._]\d+[._].*transformer_blocks[._][1-9]"
    r"|output_blocks[._][012][._]1[._]transf"
)
_ONLY_SD = re.compile(r"input_blocks[._]([12][._]1|9|1\d)[._]|output_blocks[._]([678][._]1|9|1\d)[._]")


class Key(NamedTuple):
    """What a tensor's key says.

    Args:
        name: of the module, kohya's; `lora_unet_#7` where modules are numbered.
        slot: "down", "up", "mid", "magnitude", "alpha", "diff", "diff_b", or LyCORIS's name of a factor.
        layout: "" where the slot tells none.
        adapter: PEFT's name of it, inside the key of a model's own state.
        repaired: a prefix stood there twice.
    """

    name: str
    slot: str
    layout: str
    adapter: str = ""
    repaired: bool = False


def layer_names(keys: Iterable[str]) -> list[str]:
    """The layers that a file of these keys changes; none where it numbers them."""
    names = {parsed.name for key in keys if (parsed := parse_key(key))}
    if any("#" in name for name in names):
        return []
    return sorted(layer_name(*unflatten(name)) for name in names)


def layer_name(component: str, dotted: str) -> str:
    """A layer's name among both models': `mid_block.…`, or `text_encoder.encoder.…` without `text_model`."""
    return dotted if component == "unet" else f"text_encoder.{dotted.removeprefix('text_model.')}"


def parse_key(key: str) -> Key | None:
    """What a key says; None when it is none of a LoRA's for Stable Diffusion 1.x and 2.x."""
    if match := _SIMO.fullmatch(key):
        where, index, slot = match.groups()
        return Key(f"{'lora_unet' if where == 'unet' else 'lora_te'}_#{index}", slot, "cloneofsimo")
    adapter = ""
    if match := _ADAPTER.fullmatch(key):
        adapter = match[2]
        key = match[1] + (match[3] or "")
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    stem, slot = match[1], match[2] or match[3]
    named = _flat(stem) if "." not in stem else None
    named = named or _dotted(stem)
    if named is None:
        return None
    name, repaired = named
    slot, layout = _SLOTS.get(slot, (slot, {"hada": "loha", "lokr": "lokr"}.get(slot[:4], "")))
    return Key(name, slot, layout, adapter, repaired)


def _flat(stem: str) -> tuple[str, bool] | None:
    """The name of a module that has `_` for dots, and whether its prefix was doubled."""
    match = _FLAT.fullmatch(stem)
    if match is None:
        return None
    tool, path = match.groups()
    seen: list[str] = []
    while match := _FLAT_PREFIX.match(path):
        seen += filter(None, match.groups())
        path = path[match.end() :]
    components: set[Component] = {_COMPONENTS[each] for each in seen if each != "lora"}
    bare = _rooted(path) if tool == "lycoris" else None
    component = components.pop() if components else bare
    if component is None or components:
        return None
    if component == "unet" and _ORIGINAL.match(path):
        path = _today(split_name(path)) or path
    return _named(component, path, len(seen) > 1)


def _dotted(stem: str) -> tuple[str, bool] | None:
    seen: list[str] = []
    while match := _PREFIX.match(stem):
        seen.append(match[1])
        stem = stem[match.end() :]
    components: list[Component] = [_COMPONENTS[each] for each in seen if each in _COMPONENTS]
    if len(set(components)) > 1:
        return None
    component = components[0] if components else _rooted(stem)
    if component is None:
        return None
    stem = stem.replace(".processor.", ".")
    if component == "unet":
        stem = _today(stem) or stem if _ORIGINAL.match(stem) else motion_name(stem)
        stem = re.sub(r"\.to_out$", ".to_out.0", stem)
    else:
        stem = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", stem)
    return _named(component, stem, len(set(seen)) < len(seen))


def _named(component: Component, path: str, repaired: bool) -> tuple[str, bool] | None:
    if not _ROOTS[component].match(path):
        return None
    return kohya_name(component, path), repaired


def _rooted(path: str) -> Component | None:
    """The component of a path without a prefix."""
    if _ORIGINAL.match(path):
        return "unet"
    return next((component for component, roots in _ROOTS.items() if roots.match(path)), None)


def _today(original: str) -> str | None:
    """`input_blocks.4.1.proj_in` -> `down_blocks.1.attentions.0.proj_in`; a level of SD has two resnets."""
    name = unet_name(f"{original}.weight", 2)
    return name and name.removesuffix(".weight")


def is_3x3(name: str) -> bool:
    """Whether a module, by kohya's name, is a convolution of 3x3."""
    return re.search(r"_(conv1|conv2|(down|up)samplers_0_conv|unet_conv_in|unet_conv_out)$", name) is not None


def original_base(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The base, "SD" or "SDXL", of a file whose keys have the original names; None where none has.

    Which blocks have attention tells it. What fits both is SDXL's, unless it reads text of SD's width.
    """
    keys = [key for key in shapes if _ORIGINAL_BLOCK.search(key)]
    if not keys:
        return None
    if _any(_ONLY_SDXL, keys):
        return "SDXL"
    text = [key for key in keys if re.search(r"attn2[._]to_[kv]\.(lora_down|lora_A)", key)]
    is_sd = _any(_ONLY_SD, keys) or any(shapes[key][1:2] in ((768,), (1024,)) for key in text)
    return "SD" if is_sd else "SDXL"


def _any(pattern: re.Pattern[str], keys: Iterable[str]) -> bool:
    return any(pattern.search(key) for key in keys)
