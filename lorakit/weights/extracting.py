"""A LoRA out of two bases: their difference, tensor by tensor, whatever layout each of them has."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ground.errors import UserError
from lorakit.weights.base import BaseInfo
from lorakit.weights.lora_file import TARGET_PRESETS, kohya_name
from lorakit.weights.lora_metadata import Component
from lorakit.weights.merging import base_here
from lorakit.weights.mixing import Factors, Mixed, factorise, packed
from lorakit.weights.part_files import read_places

COMPONENTS: tuple[Component, ...] = ("unet", "text_encoder")


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
    biases: bool = False,
    dtype: torch.dtype = torch.float32,
    base_config: str | None = None,
) -> Extracted:
    """The difference of two bases of one architecture, tuned - base, as a LoRA; see `mixing.truncate`.

    Args:
        targets: a preset of TARGET_PRESETS. A fine-tuned model changes biases, norms and embeddings too, for
            which LoRA has no place.
        biases: biases and norms too, as `lora_file.is_vector` says.
        base_config: see inspect_base; for those of the two that are single files.
    Raises:
        UserError: the bases differ in architecture, or nowhere else.
    """
    first, second = base_here(base, base_config), base_here(tuned, base_config)
    results: dict[str, Factors] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    squares: dict[str, tuple[float, float]] = {}
    outside = 0.0
    for component in COMPONENTS:
        ends = tuple(f".{end}.weight" for end in TARGET_PRESETS[component][targets])
        for key, change in _changes(first, second, component):
            total = float(change.double().square().sum())
            if total and biases and change.ndim == 1:
                stem, _, end = key.rpartition(".")
                name = kohya_name(component, stem) + (".bias" if end == "bias" else "")
                results[name], shapes[name] = (change[:, None], torch.ones(1, 1)), (1,)
                squares[name] = 0.0, total
            elif total and change.ndim in (2, 4) and f".{key}".endswith(ends):
                name, matrix = kohya_name(component, key.removesuffix(".weight")), change.flatten(1)
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
    """tuned - base of every tensor of a component, float32, one at a time, by its name of today."""
    before, after = (dict(sorted(info.places(component).items())) for info in (first, second))
    shapes, others = ({name: place.shape for name, place in own.items()} for own in (before, after))
    if shapes != others:
        name = min(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
        raise UserError(
            f"{first.name} and {second.name} differ in architecture: {component} {name} is "
            f"{shapes.get(name, 'missing')} and {others.get(name, 'missing')}"
        )
    for (name, old), (_, new) in zip(read_places(before), read_places(after), strict=True):
        yield name, new.float() - old.float()
