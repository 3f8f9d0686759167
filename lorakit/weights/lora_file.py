"""LoRAs as files hold them: one canonical form for every layout, and the three layouts that are written.

A module is named as kohya's sd-scripts names it (`lora_unet_mid_block_attentions_0_proj_in`), because every
other naming flattens to it; the way back, `unflatten`, is a rule. The change of a module's weight is
delta = (alpha / rank) * up @ down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from lorakit.ground.errors import DivergedError, UserError
from lorakit.weights.adapter_config import adapter_metadata
from lorakit.weights.lora_metadata import Component
from lorakit.weights.original_names import original_motion_layer
from lorakit.weights.tensors import chunks, payload_sha256

if TYPE_CHECKING:
    import torch

Layout = Literal["kohya", "diffusers", "animatediff"]

_PREFIXES: dict[Component, str] = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One module's LoRA.

    Args:
        down: (rank, in), or (rank, in, k, k) for a convolution.
        up: (out, rank), or (out, rank, 1, 1). A vector of n numbers, of a bias or a norm, is a weight (n, 1).
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
        layout: "kohya", "diffusers" (lora_A and lora_B), "diffusers-old" (lora.down, attention processors),
            "cloneofsimo", whose modules are known by position only and named `lora_unet_#7`, or what the file
            had instead of LoRA: "loha", "lokr", "whole" (differences of whole weights).
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

_MOTION = "motion_modules."

# Ends of module paths, in which * stands for anything. proj_in and proj_out are 1x1 convolutions in SD 1.x
# and linear in SD 2.x.
TARGET_PRESETS: dict[Component, dict[str, tuple[str, ...]]] = {
    "unet": {
        "attention": _ATTENTION,
        "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
        "all": (*_ATTENTION, *_FEED_FORWARD, *_CONVOLUTION),
        "temporal": tuple(f"{_MOTION}*.{name}" for name in _ATTENTION),
    },
    "text_encoder": {
        "attention": _CLIP_ATTENTION,
        "attention+ff": _CLIP_ALL,
        "all": _CLIP_ALL,
        "temporal": (),
    },
}

# What `_` joins inside one attribute name of the U-Net and of CLIP, the original code's last; every other `_`
# was a dot.
_TOKENS = (
    "down_blocks up_blocks mid_block transformer_blocks time_embedding time_emb_proj linear_1 linear_2 "
    "conv_in conv_out conv_norm_out conv_shortcut to_q to_k to_v to_out proj_in proj_out "
    "text_model self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm "
    "token_embedding position_embedding "
    "motion_modules "
    "input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed"
).split()
_SPLIT = re.compile("|".join(rf"{token}(?=[_.]|$)" for token in _TOKENS) + "|[^_]+")


def kohya_name(component: Component, dotted: str) -> str:
    """`unet`, `mid_block.attentions.0.proj_in` -> `lora_unet_mid_block_attentions_0_proj_in`.

    transformers dropped CLIP's `text_model.` level in 5.6; every other tool still expects it: it is put back.
    """
    if component == "text_encoder":
        dotted = "text_model." + re.sub(r"^text_model[._]", "", dotted)
    return _PREFIXES[component] + dotted.replace(".", "_")


def place_name(component: Component, name: str) -> str:
    """The module of a weight or a bias; another tensor keeps its own name, which no LoRA has."""
    stem, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        return name
    return kohya_name(component, stem) + (".bias" if end == "bias" else "")


def component_of(name: str) -> Component:
    """The model that a kohya name belongs to."""
    for component, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return component
    raise UserError(f"{name}: is not a LoRA module's name; it begins with {' or '.join(_PREFIXES.values())}")


def unflatten(name: str) -> tuple[Component, str]:
    """The inverse of `kohya_name`, by rule, for the U-Net and the text encoder of SD 1.x and 2.x."""
    component = component_of(name)
    return component, split_name(name.removeprefix(_PREFIXES[component]))


def split_name(flat: str) -> str:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`, the original code's names too."""
    return ".".join(_SPLIT.findall(flat))


def ends_in(name: str, end: str) -> bool:
    """Whether a module's path ends in `end`, at a dot; * in it stands for anything."""
    return fnmatchcase(f".{name}", f"*.{end}")


def is_motion(name: str) -> bool:
    """Whether a module, by either name, is of a motion adapter."""
    return re.search(r"[._]motion_modules[._]", name) is not None


def reads_text(name: str) -> bool:
    """Whether a module, by kohya name, takes the text encoder's states."""
    return name.endswith(("attn2_to_k", "attn2_to_v")) and not is_motion(name)


def is_vector(name: str) -> bool:
    """Whether a module is a bias (`lora_unet_conv_in.bias`) or a norm, which no adapter changes."""
    return name.endswith(".bias") or re.search(r"norm(\d|_out)?$", name) is not None


def refuse_vectors(modules: Mapping[str, LoraPair], label: str) -> None:
    """Raises UserError: the LoRA `label` changes biases or norms."""
    if vectors := [name for name in modules if is_vector(name)]:
        raise UserError(
            f"{label}: changes {len(vectors)} biases and norms, such as {vectors[0]}, which no adapter can; "
            "make a base of it with `mix_lora.py merge`"
        )


def base_of(modules: Mapping[str, LoraPair]) -> str | None:
    """The base model's family, by the width of the text that cross attention reads; None if unknown."""
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
    widths = (pair.down.shape[1] for name, pair in modules.items() if reads_text(name))
    return families.get(next(widths, 0))


# ---- writing ----


def lora_bytes(
    modules: Mapping[str, LoraPair],
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
    words: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """The content of a LoRA file; see `lora_chunks`."""
    return b"".join(lora_chunks(modules, layout=layout, dtype=dtype, metadata=metadata, words=words))


def lora_chunks(
    modules: Mapping[str, LoraPair],
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
    words: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[bytes | memoryview[int]]:
    """The content of a LoRA file in pieces, a pure function of the arguments; the caller publishes it.

    The hashes of the tensor bytes that other tools look for are added to the metadata. Where alpha differs
    between the attention modules of one model, diffusers 0.42 reads kohya's layout wrongly, its own rightly.

    Args:
        dtype: of the tensors but for alpha, which stays float32; None keeps each tensor's own.
        words: what new words stand for, (n, D) each, put beside the LoRA as A1111 reads them there.
    Raises:
        DivergedError: a tensor is not finite, or not in `dtype`.
        UserError: no modules; DoRA in the kohya layout; biases and norms in the others; in AnimateDiff's what
            is no LoRA for motion.
    """
    if not modules:
        raise UserError("there is no LoRA module to write")
    if layout != "diffusers" and any(pair.magnitude is not None for pair in modules.values()):
        raise UserError(
            f"DoRA cannot be written in the {layout} layout: its readers drop or reinterpret the magnitudes. "
            'Choose save_format "diffusers"'
        )
    if layout == "animatediff":
        modules = folded(modules)  # which has no place for an alpha
        if strange := [name for name in modules if not is_motion(name)]:
            raise UserError(
                f"{len(strange)} of {len(modules)} modules, such as {strange[0]}, are not of a motion "
                "adapter and have no place in AnimateDiff's layout. Choose format=diffusers"
            )
    if layout == "diffusers" and (vectors := [name for name in modules if is_vector(name)]):
        raise UserError(
            f"{len(vectors)} biases and norms, such as {vectors[0]}, have no place in the diffusers layout. "
            "Choose format=kohya, or merge the file into a base"
        )
    tensors = _laid_out(modules, layout, dtype)
    for word, rows in (words or {}).items():
        tensors[f"bundle_emb.{word}.string_to_param.*"] = rows.to(dtype or rows.dtype)
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


def _laid_out(
    modules: Mapping[str, LoraPair], layout: Layout, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors of a file by the keys of its layout."""
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in sorted(modules.items()):
        own = {slot: tensor.to(dtype or tensor.dtype) for slot, tensor in pair.tensors().items()}
        if layout == "kohya":
            tensors |= _kohya_tensors(name, own, pair.alpha)
        elif layout == "diffusers":
            tensors |= _diffusers_tensors(name, own)
        else:
            stem = original_motion_layer(unflatten(name)[1])
            tensors |= {f"{stem}_lora.{slot}.weight": tensor for slot, tensor in own.items()}
    return tensors


def folded(modules: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """The same changes with alpha = rank, by `up`: for readers that know the tensors and no alpha.

    DoRA's too, which renormalizes the sum of the base and the scaled product. Where the scaled `up` has no
    room in its dtype, a power of two moves from one factor to the other.
    """
    return {name: _folded(pair) for name, pair in modules.items()}


def _folded(pair: LoraPair) -> LoraPair:
    import torch

    up, down = pair.up.float() * pair.scale, pair.down.float()
    rounded = up.to(pair.up.dtype).float()
    fits = bool((rounded - up).norm() <= torch.finfo(pair.up.dtype).eps * up.norm())  # not with infinity
    if down.any() and not fits:
        shift = 2.0 ** round(0.5 * math.log2(float(down.abs().max() / up.abs().max())))
        up, down = up * shift, down / shift
    return replace(pair, up=up.to(pair.up.dtype), down=down.to(pair.down.dtype), alpha=float(pair.rank))


def _kohya_tensors(name: str, own: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    import torch

    component_of(name)
    if is_vector(name):
        kind = "norm" if is_vector(name.removesuffix(".bias")) else "diff"
        end = {"norm": ("w_norm", "b_norm"), "diff": ("diff", "diff_b")}[kind][name.endswith(".bias")]
        change = alpha / len(own["down"]) * own["up"].float() @ own["down"].float()
        return {f"{name.removesuffix('.bias')}.{end}": change.flatten().to(own["up"].dtype)}
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
