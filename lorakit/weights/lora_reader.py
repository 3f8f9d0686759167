"""LoRA files of every layout met in the wild, read into the one form of lora_file.py or refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import AdapterAlphas, config_beside, lora_path
from lorakit.weights.learnt_words import BUNDLED
from lorakit.weights.lora_file import LoraFile, LoraPair, base_of, is_vector, unflatten
from lorakit.weights.lora_foreign import USE_SD, refuse_foreign, some
from lorakit.weights.lora_keys import Key, is_3x3, parse_key
from lorakit.weights.tensors import read_header, read_tensors

if TYPE_CHECKING:
    import torch

Part = dict[str, "torch.Tensor"]
"""A module's tensors by slot, see `lora_keys.Key`."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What stands in a file before it is made LoRA.

    Args:
        path: of the file, in a folder too.
        modules: by kohya name.
        notes: what a user should know of the file.
    """

    path: Path
    modules: dict[str, Part]
    metadata: dict[str, str]
    layout: str
    alphas: AdapterAlphas
    notes: tuple[str, ...]


def read_lora(path: Path | str) -> LoraFile:
    """Reads a LoRA file of any layout for SD 1.x and 2.x, or PEFT's folder; without alpha it is the rank.

    Raises:
        UserError: one message that says what the file is and why it is refused.
        OutputError: it cannot be read.
    """
    parts = read_parts(path)
    if any(is_product(part) for part in parts.modules.values()):
        raise UserError(
            f"{parts.path}: is a LoHa or LoKr file, not a LoRA; make a LoRA of it with `mix_lora.py convert`"
        )
    return lora_of(parts, {})


def read_parts(path: Path | str) -> Parts:
    """The tensors of a file by module and slot; raises as `read_lora`."""
    path = lora_path(path)
    shapes, metadata = read_header(path)
    beside = config_beside(path, shapes)
    if beside is not None:
        _alphas(path, {}, beside)  # it tells what is no LoRA by its name
    refuse_foreign(path, shapes)
    alphas = _alphas(path, metadata, beside)
    tensors, _ = read_tensors(path)
    notes = []
    if words := sorted({match[1] for match in map(BUNDLED.fullmatch, tensors) if match}):
        notes.append(f"a learnt word lies beside the LoRA: {', '.join(words)}; prompt_syntax=a1111 reads it")
        tensors = {key: tensor for key, tensor in tensors.items() if not BUNDLED.fullmatch(key)}
    tensors, was_float8 = _as_half(tensors)
    notes += ["float8 is read as float16, which holds its numbers exactly"] * was_float8
    _refuse_bad_numbers(path, tensors)
    keys = _keys(path, tensors)
    modules: dict[str, Part] = {}
    for key, (name, slot, *_) in keys.items():
        if slot in modules.setdefault(name, {}):
            raise UserError(f"{path}: holds {slot} of {name} twice, under two spellings")
        modules[name][slot] = tensors[key]
    if any(key.repaired for key in keys.values()):
        notes.append("its names have a doubled prefix, as a conversion done twice leaves; one was taken off")
    parts = Parts(path, modules, metadata, _layout(keys, modules), alphas, tuple(notes))
    return replace(parts, notes=(*notes, *_strength_notes(parts)))


def lora_of(parts: Parts, made: Mapping[str, LoraPair]) -> LoraFile:
    """A file as LoRA; modules in `made` stand for its own."""
    modules: dict[str, LoraPair] = {}
    for name, part in parts.modules.items():
        if not is_product(part):
            modules |= pairs(parts, name, part)
    modules |= made
    if base_of(modules) == "SDXL":
        raise UserError(f"{parts.path}: is for SDXL: its cross attention reads text of width 2048; {USE_SD}")
    return LoraFile(modules, parts.metadata, parts.layout)


def is_product(part: Part) -> bool:
    """Whether a module is LoHa's or LoKr's."""
    return any(slot.startswith(("hada_", "lokr_")) for slot in part)


# ---- tensors ----


def _as_half(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    import torch

    halves = {
        key: tensor.half()
        for key, tensor in tensors.items()
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    }
    return {**tensors, **halves}, bool(halves)


def _refuse_bad_numbers(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith("alpha"):
            raise UserError(f"{path}: {key} holds {tensor.dtype}; LoRA weights are floating point")
        if tensor.is_floating_point() and tensor.element_size() == 1:
            raise UserError(f"{path}: {key} holds {tensor.dtype}, which is not read; save it as float16")
    # LyCORIS writes infinity for a rank of 100000 as fp16; of LoKr's whole matrices alpha counts for nothing.
    unread = {
        f"{stem}.alpha"
        for stem in (key.removesuffix(".lokr_w2") for key in tensors if key.endswith(".lokr_w2"))
        if f"{stem}.lokr_w1" in tensors
    }
    bad = sorted(key for key in tensors.keys() - unread if not tensors[key].float().isfinite().all())
    if bad:
        raise UserError(f"{path}: holds NaN or infinity, so that images come out black: {some(bad)}")


def _keys(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Key]:
    keys, unknown = {}, []
    for key in sorted(tensors):
        parsed = parse_key(key)
        if parsed is None or (parsed.slot == "mid" and tensors[key].ndim < 3):
            unknown.append(key)
        else:
            keys[key] = parsed
    if unknown:
        raise UserError(f"{path}: holds keys that belong to no known LoRA layout: {some(unknown)}")
    adapters = sorted({key.adapter for key in keys.values() if key.slot != "alpha"})
    if len(adapters) > 1:
        raise UserError(f"{path}: holds the adapters {', '.join(adapters)} in one file; save each alone")
    return keys


def _layout(keys: Mapping[str, Key], modules: Mapping[str, Part]) -> str:
    """What a part of the modules must be made of, or else the layout of most keys."""
    found = Counter(key.layout for key in keys.values())
    if any("diff" in part and not is_vector(name) for name, part in modules.items()):
        return "whole"
    if found["loha"] or found["lokr"]:
        return "loha" if found["loha"] else "lokr"
    del found[""]
    return found.most_common(1)[0][0] if found else ""


# ---- strength ----


def _alphas(path: Path, metadata: dict[str, str], beside: dict[str, Any] | None) -> AdapterAlphas:
    try:
        return AdapterAlphas(metadata, beside, label=str(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: its metadata on alpha cannot be read ({error}), so its strength is unknown"
        ) from error


def _strength_notes(parts: Parts) -> list[str]:
    if _is_dylora(parts):
        return [
            "is DyLoRA, which LyCORIS runs at a rank drawn at random and at alpha / blocks: it is read at "
            "its whole rank and at alpha / rank, as all readers do, which is weaker"
        ]
    untold = [
        name
        for name, part in parts.modules.items()
        if "alpha" not in part
        and "diff" not in part
        and "#" not in name
        and not parts.alphas.known(unflatten(name)[0])
    ]
    is_pefts = parts.layout == "diffusers" or (untold and parts.layout in ("loha", "lokr"))
    if not untold or not is_pefts:
        return []
    return [
        "tells no alpha, so that its strength is unknown: alpha = rank is taken. PEFT's is in "
        "adapter_config.json; lay it beside the file"
    ]


def _is_dylora(parts: Parts) -> bool:
    """By convolutions whose up half is a matrix, or by kohya's metadata; linear layers alone do not tell."""
    try:
        told = json.loads(parts.metadata["ss_network_args"])["algo"]
    except (KeyError, ValueError, TypeError):
        told = None
    return told == "dylora" or any(_is_dyloras(name, part) for name, part in parts.modules.items())


def _is_dyloras(name: str, part: Part) -> bool:
    """Whether a module is a convolution whose up half is a matrix."""
    if "down" not in part or "up" not in part or (part["down"].ndim, part["up"].ndim) != (4, 2):
        return False
    return part["down"].shape[2:] == (1, 1) or is_3x3(name)


# ---- modules ----


def pairs(parts: Parts, name: str, part: Part) -> dict[str, LoraPair]:
    """The LoRA of a module and, where the file changes it, of its bias."""
    found = {}
    if "diff_b" in part:
        found[f"{name}.bias"] = whole(part["diff_b"])
    rest = {slot: tensor for slot, tensor in part.items() if slot != "diff_b"}
    if "diff" in rest:
        if "down" in rest or "up" in rest:
            raise UserError(f"{parts.path}: {name} has both a LoRA and a whole difference")
        return {name: whole(rest["diff"]), **found}
    return {name: _pair(parts, name, rest), **found} if rest else found


def whole(difference: torch.Tensor) -> LoraPair:
    """A whole difference of a weight as the LoRA that it is: one factor is the unit matrix.

    Args:
        difference: (out, in[, k, k]); a vector, of a bias or a norm, is taken for (n, 1).
    """
    import torch

    matrix = difference.flatten(1) if difference.ndim > 1 else difference[:, None]
    rank = min(matrix.shape)
    unit = torch.eye(rank, dtype=difference.dtype)
    up, down = (unit, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, unit)
    inside = difference.shape[1:] if difference.ndim > 1 else (1,)
    ones = [1] * (len(inside) - 1)
    return LoraPair(down.reshape(rank, *inside), up.reshape(len(up), rank, *ones), float(rank))


def _pair(parts: Parts, name: str, part: Part) -> LoraPair:
    path = parts.path
    for half in ("down", "up"):
        if half not in part:
            raise UserError(f"{path}: {name} has no {half} weight; the file is incomplete")
    down, up, magnitude = part["down"], part["up"], part.get("magnitude")
    if _is_dyloras(name, part):
        up = up[:, :, None, None]
    if "mid" in part:
        down = _composed(path, name, part["mid"], down)
    is_linear, is_conv = down.ndim == up.ndim == 2, down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
    if not (is_linear or is_conv) or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        sides = f"down {[*down.shape]}, up {[*up.shape]}"
        raise UserError(f"{path}: {name} has shapes that do not multiply: {sides}")
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise UserError(f"{path}: {name} has {magnitude.numel()} DoRA magnitudes for {up.shape[0]} outputs")
    return LoraPair(down, up, alpha_of(parts, name, part, down.shape[0]), magnitude)


def alpha_of(parts: Parts, name: str, part: Part, rank: int) -> float:
    """A module's alpha: its own tensor, or what a config tells, or the rank."""
    if "alpha" not in part:
        return parts.alphas.alpha(*unflatten(name), rank)
    if part["alpha"].numel() != 1:
        raise UserError(f"{parts.path}: alpha of {name} is not one number")
    return float(part["alpha"].item())


def _composed(path: Path, name: str, mid: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """LoCon's CP form as LoRA of its rank: delta = up @ D, D[i,c,k,l] = sum_j mid[i,j,k,l] down[j,c]."""
    import torch

    inner = down.flatten(1)
    if mid.ndim != 4 or mid.shape[1] != inner.shape[0] or mid.shape[0] != mid.shape[1]:
        sides = f"mid {[*mid.shape]}, down {[*down.shape]}"
        raise UserError(f"{path}: {name} has shapes that do not multiply: {sides}")
    return torch.einsum("ijkl,jc->ickl", mid.float(), inner.float()).to(down.dtype)
