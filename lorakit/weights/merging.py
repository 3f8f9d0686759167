"""LoRAs merged into a base, tensor by tensor: a folder, a single file or what is in the hub's cache.

W_merged = W + sum_i w_i * (alpha_i / r_i) * B_i @ A_i, in float32, then rounded to the dtype of W.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.ground.errors import UserError
from lorakit.ground.publish import check_writable, explained, own_name, publish_file, remove, sync
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.lora_file import LoraPair, base_of, component_of, place_name
from lorakit.weights.lora_fit import find_misfit
from lorakit.weights.lora_metadata import Component
from lorakit.weights.mixing import Source, check_same_base, concatenated, factors
from lorakit.weights.original_names import names_of, plain_name
from lorakit.weights.part_files import BaseError
from lorakit.weights.tensors import Shapes, read_header, tensor_bytes

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECKPOINTS = {".safetensors", ".ckpt", ".bin", ".pt", ".pth"}
_AVERAGES = "model_ema."
_SMALL = 1 << 20  # bytes: below it a copy costs nothing, above it a link saves the disk

Terms = Mapping[str, Sequence[tuple[LoraPair, float]]]

Names = Callable[[str], Sequence[str]]
"""The modules (kohya names) whose weights a tensor of a file holds, stacked along its first axis."""


@dataclass
class Merge:
    """What a merge did.

    Args:
        rewritten, left_out: paths in the folder.
        dtypes: of the weights that changed.
        rounding, change: sums of squares of what rounding to those dtypes altered, and of the change itself.
    """

    rewritten: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    rounding: float = 0.0
    change: float = 0.0

    def error(self) -> float:
        """The relative error of the change by rounding."""
        return math.sqrt(self.rounding / self.change) if self.change else 0.0


def merge(
    base: str,
    sources: Sequence[Source],
    out: Path,
    *,
    overwrite: bool = False,
    base_config: str | None = None,
) -> Merge:
    """Writes a copy of a base with LoRAs added to its weights; it appears whole or not at all.

    A single file becomes a single file, every other base a folder: there each safetensors file of a changed
    component is rewritten, its half-precision variant too; the rest is copied, and hard-linked where it is
    large. What would hold the old model is left out: weights in other forms, checkpoints beside them, and the
    averages (EMA) in a single file.

    Args:
        base_config: see inspect_base.

    Raises:
        UserError: no base, a module without its place in it, or an `out` that `check_target` refuses.
        OutputError: it cannot be written.
    """
    check_same_base(sources)
    info = base_here(base, base_config)
    names = sorted({name for _, modules, _ in sources for name in modules})
    terms = {n: [(modules[n], weight) for _, modules, weight in sources if n in modules] for n in names}
    changed: set[Component] = {component_of(name) for name in names}
    for path, modules, _ in sources:
        check_places(info, modules, path)
    check_target(out, info, overwrite)
    done = Merge()
    if info.root is None:
        _merge_file(info, out, changed, terms, done)
    else:
        _merge_folder(info.root, out, changed, terms, done)
    return done


def base_here(name: str, base_config: str | None = None) -> BaseInfo:
    """A base whose files are on this machine.

    Raises:
        BaseError: they are not, or it is none.
    """
    info = inspect_base(name, base_config if Path(name).is_file() else None)
    if not info.known:
        raise BaseError(f"{info.notes[0]}; name a base that is here: a diffusers folder, a file, a cached id")
    return info


def check_target(out: Path, info: BaseInfo, overwrite: bool) -> None:
    """Raises UserError unless a copy of this base may be written to `out`."""
    is_file = info.root is None
    if out.suffix != ".safetensors" if is_file else out.suffix in _CHECKPOINTS:
        wanted = "a file, whose name ends in .safetensors" if is_file else "a folder"
        raise UserError(f"{out}: {info.name} is a {info.kind} base, so that out must be {wanted}")
    root = info.root or info.files["unet"]
    if root.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in root.resolve().parents:
        raise UserError(f"{out}: is the base itself, inside it or around it; choose another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another name or set overwrite=true")
    if out.exists() and not is_file and not (out / "unet/config.json").is_file():
        raise UserError(
            f"{out}: exists and is no base folder, so that it is not replaced; choose another name"
        )


# ---- a single file ----


def _merge_file(info: BaseInfo, out: Path, changed: set[Component], terms: Terms, done: Merge) -> None:
    path = info.files["unet"]
    dropped = _AVERAGES if "unet" in changed else None
    if dropped and any(key.startswith(dropped) for key in read_header(path)[0]):
        done.left_out.append(f"{dropped}*")
    done.rewritten.append(out.name)

    def modules(key: str) -> list[str]:
        return [place_name(part, name) for part in changed for name in names_of(part, key, info.configs)]

    check_writable(out.parent, path.stat().st_size)
    publish_file(out, lambda temp: _rewrite(path, temp, modules, terms, done, dropped))


# ---- a folder ----


def _merge_folder(root: Path, out: Path, changed: set[Component], terms: Terms, done: Merge) -> None:
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_hidden(path, root)]
    weights = [path for path in files if path.relative_to(root).parts[0] in changed]
    check_writable(out.parent, sum(path.stat().st_size for path in weights))
    stage = out.parent / own_name("tmp")
    try:
        with explained(out):
            for path in files:
                _put(path, stage, path.relative_to(root), changed, terms, done)
            _swap(stage, out)
    finally:
        remove(stage)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def check_places(
    info: BaseInfo, modules: Mapping[str, LoraPair], label: str, more: Shapes | None = None
) -> None:
    """Raises UserError unless every module of the LoRA `label` has a tensor of its size in a base.

    Args:
        more: as of `fit_of`.
    """
    sides = {name: (pair.up.shape[0], pair.down[0].numel()) for name, pair in modules.items()}
    misfit = find_misfit(info, sides, more)
    if misfit is None:
        return
    made_for = f"; the LoRA is made for {base_of(modules)}" if base_of(modules) else ""
    if not misfit.shape:
        raise UserError(
            f"{info.name}: {len(misfit.names)} of {misfit.count} modules of {label} have no place in its "
            f"{misfit.part}, such as {', '.join(misfit.names[:3])}{made_for}"
        )
    raise UserError(
        f"{info.name}: {misfit.names[0]} of {label} does not fit: the base has {[*misfit.shape]}, the LoRA "
        f"{[*misfit.sides]}{made_for}"
    )


def _put(path: Path, stage: Path, place: Path, changed: set[Component], terms: Terms, done: Merge) -> None:
    """One file of the base: merged, left out, copied or linked."""
    target = stage / place
    component: Component | None = next((each for each in changed if place.parts[0] == each), None)
    if component and path.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        _rewrite(path, target, lambda key: _in_folder(component, key), terms, done)
        done.rewritten.append(str(place))
    elif (component and path.suffix != ".json") or (len(place.parts) == 1 and path.suffix in _CHECKPOINTS):
        done.left_out.append(str(place))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path.resolve(), target)


def _link_or_copy(path: Path, target: Path) -> None:
    if path.stat().st_size >= _SMALL:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def _in_folder(component: Component, key: str) -> list[str]:
    name = plain_name(component, key)
    return [place_name(component, name)] if name else []


# ---- files of tensors ----


def _rewrite(
    path: Path, target: Path, modules: Names, terms: Terms, done: Merge, dropped: str | None = None
) -> None:
    """A weights file with the changes added to the tensors that have any; its other bytes are the same.

    Args:
        dropped: beginning of the names of tensors that are left out.
    """
    read_header(path)  # refuses what is broken
    with path.open("rb") as source, target.open("wb") as file:
        text = source.read(int.from_bytes(source.read(8), "little"))
        start = source.tell()
        header = json.loads(text)
        kept = _without(header, dropped)
        text = (
            text if kept == header else json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()
        )
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        entries = {key: entry for key, entry in header.items() if key in kept and key != "__metadata__"}
        for key, entry in _in_order(entries):
            source.seek(start + entry["data_offsets"][0])
            data = bytearray(source.read(entry["data_offsets"][1] - entry["data_offsets"][0]))
            own = [terms.get(name, ()) for name in modules(key)]
            file.write(tensor_bytes(_merged(path, key, entry, data, own, done)) if any(own) else data)
        file.flush()
        os.fsync(file.fileno())


def _in_order(entries: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(entries.items(), key=lambda item: item[1]["data_offsets"])


def _without(header: dict[str, Any], dropped: str | None) -> dict[str, Any]:
    """The header without tensors whose names begin with `dropped`, and without the gaps that they leave."""
    if dropped is None or not any(key.startswith(dropped) for key in header):
        return header
    metadata = header.get("__metadata__")
    kept: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, entry in _in_order({key: entry for key, entry in header.items() if key != "__metadata__"}):
        if not key.startswith(dropped):
            first, last = entry["data_offsets"]
            kept[key] = entry | {"data_offsets": [end, end + last - first]}
            end += last - first
    return kept


def _merged(
    path: Path, key: str, entry: dict, data: bytearray, own: Sequence[Sequence[Any]], done: Merge
) -> Tensor:
    """A tensor with the changes of each of the weights that are stacked in it."""
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {key} is {entry['dtype']}; take a base of float32, fp16 or bf16")
    weight = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]])
    change = torch.full(weight.shape, -0.0)  # added, it changes no bit
    for part, pairs in zip(change.chunk(len(own)), own, strict=True):
        if pairs:
            up, down = concatenated([factors(pair, scale) for pair, scale in pairs])
            part += (up @ down).flatten()
    exact = weight.float() + change
    rounded = exact.to(weight.dtype)
    done.dtypes.add(str(weight.dtype).removeprefix("torch."))
    done.rounding += float((rounded.float() - exact).double().square().sum())
    done.change += float(change.double().square().sum())
    return rounded


def _swap(stage: Path, out: Path) -> None:
    old = out.parent / own_name("old")
    if out.exists():
        os.rename(out, old)
    os.rename(stage, out)
    sync(out.parent)
    remove(old)
