"""LoRA files: every layout met in the wild in one canonical form, and the two layouts that are written.

A module is named as kohya's sd-scripts names it (`lora_unet_mid_block_attentions_0_proj_in`), because every
other naming flattens to it; the way back, `unflatten`, is a rule. The change of a module's weight is
delta = (alpha / rank) * up @ down.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.ground.errors import DivergedError, UserError
from lorakit.weights.lora_metadata import AdapterAlphas, Component, adapter_metadata
from lorakit.weights.tensors import Shapes, chunks, payload_sha256, read_header, read_tensors

if TYPE_CHECKING:
    import torch

Layout = Literal["kohya", "diffusers"]

_PREFIXES: dict[Component, str] = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One module's LoRA.

    Args:
        down: (rank, in), or (rank, in, k, k) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        magnitude: DoRA's learned column norms, (out,) or (1, out, 1, 1); None for plain LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tensors(self) -> dict[str, torch.Tensor]:
        """down, up and, for DoRA, magnitude, by name."""
        pair = {"down": self.down, "up": self.up}
        return pair if self.magnitude is None else {**pair, "magnitude": self.magnitude}

    def delta(self) -> torch.Tensor:
        """The change of the module's weight, float32, in the weight's shape.

        Raises:
            UserError: for DoRA, whose change depends on the base weight.
        """
        if self.magnitude is not None:
            raise UserError("a DoRA module has no weight change of its own: it depends on the base weight")
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file holds.

    Args:
        modules: by kohya name; tensors in the dtype of the file.
        layout: "kohya", "diffusers" (lora_A and lora_B), "diffusers-old" (lora.down, attention processors) or
            "cloneofsimo", whose modules are known by position only and named `lora_unet_#7`.
    """

    modules: dict[str, LoraPair]
    metadata: dict[str, str]
    layout: str


# ---- names ----

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv")
_CONVOLUTION = ("conv1", "conv2", "conv_shortcut", *_SAMPLERS, "time_emb_proj")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_CLIP_ALL = (*_CLIP_ATTENTION, "fc1", "fc2")

# Ends of module paths. proj_in and proj_out are 1x1 convolutions in SD 1.x and linear in SD 2.x.
TARGET_PRESETS: dict[Component, dict[str, tuple[str, ...]]] = {
    "unet": {
        "attention": _ATTENTION,
        "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
        "all": (*_ATTENTION, *_FEED_FORWARD, *_CONVOLUTION),
    },
    "text_encoder": {"attention": _CLIP_ATTENTION, "attention+ff": _CLIP_ALL, "all": _CLIP_ALL},
}

# What `_` joins inside one attribute name of the U-Net and of CLIP; every other `_` was a dot.
_TOKENS = (
    "down_blocks up_blocks mid_block transformer_blocks time_embedding time_emb_proj linear_1 linear_2 "
    "conv_in conv_out conv_shortcut to_q to_k to_v to_out proj_in proj_out "
    "text_model self_attn q_proj k_proj v_proj out_proj"
).split()
_SPLIT = re.compile("|".join(rf"{token}(?=_|$)" for token in _TOKENS) + "|[^_]+")


def kohya_name(component: Component, dotted: str) -> str:
    """`unet`, `mid_block.attentions.0.proj_in` -> `lora_unet_mid_block_attentions_0_proj_in`.

    transformers dropped CLIP's `text_model.` level in 5.6; every other tool still expects it: it is put back.
    """
    if component == "text_encoder":
        dotted = "text_model." + dotted.removeprefix("text_model.")
    return _PREFIXES[component] + dotted.replace(".", "_")


def component_of(name: str) -> Component:
    """The model that a kohya name belongs to."""
    for component, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return component
    raise UserError(f"{name}: is not a LoRA module's name; it begins with {' or '.join(_PREFIXES.values())}")


def unflatten(name: str) -> tuple[Component, str]:
    """The inverse of `kohya_name`, by rule, for the U-Net and the text encoder of SD 1.x and 2.x."""
    component = component_of(name)
    return component, ".".join(_SPLIT.findall(name.removeprefix(_PREFIXES[component])))


def base_of(modules: Mapping[str, LoraPair]) -> str | None:
    """The base model's family, by the width of the text that cross attention reads; None if unknown."""
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
    widths = (
        pair.down.shape[1] for name, pair in modules.items() if name.endswith(("attn2_to_k", "attn2_to_v"))
    )
    return families.get(next(widths, 0))


# ---- writing ----


def lora_bytes(
    modules: Mapping[str, LoraPair],
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
) -> bytes:
    """The content of a LoRA file; see `lora_chunks`."""
    return b"".join(lora_chunks(modules, layout=layout, dtype=dtype, metadata=metadata))


def lora_chunks(
    modules: Mapping[str, LoraPair],
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview[int]]:
    """The content of a LoRA file in pieces, a pure function of the arguments; the caller publishes it.

    The hashes of the tensor bytes that other tools look for are added to the metadata. Where alpha differs
    between the attention modules of one model, diffusers 0.42 reads kohya's layout wrongly, its own rightly.

    Args:
        dtype: of the tensors but for alpha, which stays float32; None keeps each tensor's own.
    Raises:
        DivergedError: a tensor is not finite, or not in `dtype`.
        UserError: no modules; DoRA in the kohya layout.
    """
    if not modules:
        raise UserError("there is no LoRA module to write")
    if layout == "kohya" and any(pair.magnitude is not None for pair in modules.values()):
        raise UserError(
            "DoRA cannot be written in the kohya layout: its readers drop or reinterpret the magnitudes. "
            'Choose save_format "diffusers"'
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in sorted(modules.items()):
        own = {slot: tensor.to(dtype or tensor.dtype) for slot, tensor in pair.tensors().items()}
        tensors |= (
            _kohya_tensors(name, own, pair.alpha) if layout == "kohya" else _diffusers_tensors(name, own)
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DivergedError(f"{name} holds NaN or infinity as {tensor.dtype}: nothing was written")
    metadata = {"format": "pt", **metadata}
    if layout == "diffusers":
        facts = {unflatten(name): (pair.rank, pair.alpha) for name, pair in sorted(modules.items())}
        dora = [name for name, pair in modules.items() if pair.magnitude is not None]
        metadata |= adapter_metadata(facts, {component_of(name) for name in dora})
    digest = payload_sha256(chunks(tensors, {}))
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": "0x" + digest}
    return chunks(tensors, metadata | hashes)


def _kohya_tensors(name: str, own: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    import torch

    component_of(name)
    return {
        f"{name}.lora_down.weight": own["down"],
        f"{name}.lora_up.weight": own["up"],
        f"{name}.alpha": torch.tensor(alpha, dtype=torch.float32),
    }


def _diffusers_tensors(name: str, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    component, dotted = unflatten(name)
    # PEFT's own form has no ".weight"; transformers 5, which loads text encoders, finds only the other one.
    magnitude = "lora_magnitude_vector" + (".weight" if component == "text_encoder" else "")
    endings = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": magnitude}
    return {f"{component}.{dotted}.{endings[slot]}": tensor for slot, tensor in own.items()}


# ---- reading ----

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
