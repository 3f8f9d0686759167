"""LoRAs and whole bases, tensor by tensor: merge LoRAs into a base folder, extract a LoRA from two bases.

W_merged = W + sum_i w_i * (alpha_i / r_i) * B_i @ A_i, in float32, then rounded to the dtype of W.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lorakit.ground.errors import UserError
from lorakit.ground.publish import check_writable, explained, own_name, remove, sync
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.lora_file import TARGET_PRESETS, LoraPair, base_of, component_of, kohya_name
from lorakit.weights.lora_metadata import Component
from lorakit.weights.mixing import (
    Factors,
    Mixed,
    Source,
    check_same_base,
    concatenated,
    factorise,
    factors,
    packed,
)
from lorakit.weights.part_files import weight_shapes
from lorakit.weights.tensors import read_header, tensor_bytes

COMPONENTS: tuple[Component, ...] = ("unet", "text_encoder")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECKPOINTS = {".safetensors", ".ckpt", ".bin", ".pt", ".pth"}
_SMALL = 1 << 20  # bytes: below it a copy costs nothing, above it a link saves the disk

Terms = Mapping[str, Sequence[tuple[LoraPair, float]]]

# ---- merge ----


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


def merge(base: str, sources: Sequence[Source], out: Path, *, overwrite: bool = False) -> Merge:
    """Writes a copy of a base folder with LoRAs added to its weights; it appears whole or not at all.

    Every safetensors file of a changed component is rewritten, its half-precision variant too. Other forms of
    its weights, and checkpoints beside it, would hold the old model and are left out. The rest is copied, and
    hard-linked where it is large.

    Raises:
        UserError: no base folder, a module without its place in it, or an `out` that `check_target` refuses.
        OutputError: it cannot be written.
    """
    check_same_base(sources)
    info = _folder(base)
    root = info.files["unet"].parents[1]
    names = sorted({name for _, modules, _ in sources for name in modules})
    terms = {n: [(modules[n], weight) for _, modules, weight in sources if n in modules] for n in names}
    changed: set[Component] = {component_of(name) for name in names}
    for component in changed:
        _check_places(info, component, {n: own for n, own in terms.items() if component_of(n) == component})
    check_target(out, root, overwrite)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_hidden(path, root)]
    weights = [path for path in files if path.relative_to(root).parts[0] in changed]
    check_writable(out.parent, sum(path.stat().st_size for path in weights))
    stage, done = out.parent / own_name("tmp"), Merge()
    try:
        with explained(out):
            for path in files:
                _put(path, stage, path.relative_to(root), changed, terms, done)
            _swap(stage, out)
    finally:
        remove(stage)
    return done


def check_target(out: Path, root: Path, overwrite: bool) -> None:
    """Raises UserError unless a base may be written to `out`."""
    if root.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in root.resolve().parents:
        raise UserError(f"{out}: is the base itself, inside it or around it; choose another folder")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another name or set overwrite=true")
    if out.exists() and not (out / "model_index.json").is_file():
        raise UserError(
            f"{out}: exists and is no base folder, so that it is not replaced; choose another name"
        )


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _folder(base: str) -> BaseInfo:
    info = inspect_base(base)
    if info.kind == "folder":
        return info
    raise UserError(
        f"{base}: merge and extract need a diffusers folder on this machine, not a {info.kind} base"
    )


def _check_places(info: BaseInfo, component: Component, terms: Terms) -> None:
    shapes = {_name(component, key): shape for key, shape in weight_shapes(info.files[component]).items()}
    lost = sorted(terms.keys() - shapes.keys())
    pairs = {name: own[0][0] for name, own in terms.items()}
    made_for = f"; the LoRA is made for {base_of(pairs)}" if base_of(pairs) else ""
    if lost:
        raise UserError(
            f"{info.name}: {len(lost)} of {len(terms)} modules have no place in its {component}, such as "
            f"{', '.join(lost[:3])}{made_for}"
        )
    for name, pair in pairs.items():
        sides, shape = (pair.up.shape[0], pair.down[0].numel()), shapes[name]
        if sides != (shape[0], math.prod(shape[1:])):
            raise UserError(
                f"{info.name}: {name} does not fit: its weight is {[*shape]}, the LoRA's {[*sides]}{made_for}"
            )


def _name(component: Component, key: str) -> str:
    return kohya_name(component, key.removesuffix(".weight")) if key.endswith(".weight") else key


def _put(path: Path, stage: Path, place: Path, changed: set[Component], terms: Terms, done: Merge) -> None:
    """One file of the base: merged, left out, copied or linked."""
    target = stage / place
    component: Component | None = next((each for each in changed if place.parts[0] == each), None)
    if component and path.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        _rewrite(path, target, component, terms, done)
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


def _rewrite(path: Path, target: Path, component: Component, terms: Terms, done: Merge) -> None:
    """A weights file with the same header, and the changes added to the tensors that have any."""
    read_header(path)  # refuses what is broken
    with path.open("rb") as source, target.open("xb") as file:
        length = source.read(8)
        text = source.read(int.from_bytes(length, "little"))
        file.write(length + text)
        entries = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            data, own = bytearray(source.read(end - start)), terms.get(_name(component, key))
            file.write(tensor_bytes(_merged(path, key, entry, data, own, done)) if own else data)
        file.flush()
        os.fsync(file.fileno())


def _merged(path: Path, key: str, entry: dict, data: bytearray, own, done: Merge) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {key} is {entry['dtype']}; take a base of float32, fp16 or bf16")
    weight = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]])
    up, down = concatenated([factors(pair, scale) for pair, scale in own])
    change = (up @ down).flatten()
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


# ---- extract ----


@dataclass(frozen=True)
class Extracted:
    """A LoRA, what it holds of the targeted modules' change, and the energy of the change outside of them."""

    mixed: Mixed
    outside: float


def extract(
    base: str,
    tuned: str,
    *,
    rank: int | None,
    energy: float | None,
    targets: str = "all",
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """The difference of two bases of one architecture, tuned - base, as a LoRA; see `mixing.truncate`.

    Args:
        targets: a preset of TARGET_PRESETS. A fine-tuned model changes biases, norms and embeddings too, for
            which LoRA has no place.
    Raises:
        UserError: the bases differ in architecture, or nowhere else.
    """
    first, second = _folder(base), _folder(tuned)
    results: dict[str, Factors] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    squares: dict[str, tuple[float, float]] = {}
    outside = 0.0
    for component in COMPONENTS:
        ends = tuple(f".{end}.weight" for end in TARGET_PRESETS[component][targets])
        for key, change in _changes(first, second, component):
            total = float(change.double().square().sum())
            if total and change.ndim in (2, 4) and f".{key}".endswith(ends):
                name, matrix = _name(component, key), change.flatten(1)
                results[name] = up, down = factorise(matrix, rank, energy)
                shapes[name] = tuple(change.shape[1:])
                squares[name] = float((matrix - up @ down).double().square().sum()), total
            else:
                outside += total
    if not results:
        raise UserError(f"{base} and {tuned} do not differ in the modules of targets={targets}")
    alpha = float(max(down.shape[0] for _, down in results.values()))
    modules = {name: packed(results[name], shapes[name], alpha, dtype) for name in results}
    return Extracted(Mixed(modules, squares), outside)


def _changes(first: BaseInfo, second: BaseInfo, component: Component) -> Iterator[tuple[str, Tensor]]:
    """tuned - base of every tensor of a component, float32, one at a time."""
    before, after = (weight_shapes(info.files[component]) for info in (first, second))
    if before != after:
        unequal = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        raise UserError(
            f"{first.name} and {second.name} differ in architecture: {component} {unequal[0]} is "
            f"{before.get(unequal[0], 'missing')} and {after.get(unequal[0], 'missing')}"
        )
    readers = [_reader(info.files[component]) for info in (first, second)]
    for key in sorted(before):
        old, new = (read(key) for read in readers)
        if old.is_floating_point():
            yield key, new.float() - old.float()


def _reader(path: Path):
    """A function that reads one tensor of a weights file or, for an index, of its shards."""
    if path.suffix == ".safetensors":
        return safetensors.safe_open(path, "pt").get_tensor
    places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    shards = {name: safetensors.safe_open(path.parent / name, "pt") for name in set(places.values())}
    return lambda key: shards[places[key]].get_tensor(key)
