"""Whether a LoRA file fits a base, told by the headers of both. No torch here."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.base import BaseInfo
from lorakit.weights.lora_file import component_of, place_name
from lorakit.weights.lora_foreign import refuse_foreign, some
from lorakit.weights.lora_keys import parse_key
from lorakit.weights.lora_metadata import Component
from lorakit.weights.tensors import Shapes, read_header

Slots = dict[str, tuple[int, ...]]


def fit_of(path: str, info: BaseInfo, more: Shapes | None = None) -> str:
    """A LoRA in words: modules, ranks, parameters, and that each module has its place in the base.

    What no header tells is left to the reader: factors other than LoRA's, modules by number.

    Args:
        more: tensors that stand in the U-Net beside the base's own, as a motion adapter's do.

    Raises:
        UserError: it cannot be read, is none for Stable Diffusion, or does not fit.
    """
    place = lora_path(path)
    shapes = read_header(place)[0]
    refuse_foreign(place, shapes)
    modules: dict[str, Slots] = defaultdict(dict)
    for key, shape in shapes.items():
        if (known := parse_key(key)) is not None:
            modules[known.name][known.slot] = shape
    ranks = Counter(slots["down"][0] for slots in modules.values() if "down" in slots)
    count = sum(math.prod(s) for slots in modules.values() for slot, s in slots.items() if slot != "alpha")
    said = f"{len(modules)} modules, {count:,} parameters"
    if ranks:
        said = f"rank {', '.join(map(str, sorted(ranks)))}, {said}"
    if not info.known:
        return f"{said}; whether it fits is seen when the base is here"
    plain = {n: s for n, s in modules.items() if {"down", "up"} <= s.keys() and "mid" not in s}
    plain = {name: slots for name, slots in plain.items() if "#" not in name}
    sides = {name: (slots["up"][0], math.prod(slots["down"][1:])) for name, slots in plain.items()}
    if misfit := find_misfit(info, sides, more):
        _refuse(path, misfit, info)
    return f"{said}, {'fits' if len(plain) == len(modules) else 'fits as far as its header tells'}"


@dataclass(frozen=True)
class Misfit:
    """Why a LoRA is none for a base: `names` of its `count` modules of `part` have no place there, or the one
    of them changes (rows, columns) `sides` where the base has `shape`.
    """

    part: Component
    names: list[str]
    count: int
    sides: tuple[int, int] = (0, 0)
    shape: tuple[int, ...] = ()


def find_misfit(
    info: BaseInfo, sides: Mapping[str, tuple[int, int]], more: Shapes | None = None
) -> Misfit | None:
    """The first, in modules by kohya name with rows and columns of their change; None: each has its place."""
    parts: list[Component] = list(dict.fromkeys(component_of(name) for name in sides))
    for part in parts:
        own = [name for name in sides if component_of(name) == part]
        known = info.shapes(part) | (more or {} if part == "unet" else {})
        shapes = {place_name(part, key): shape for key, shape in known.items()}
        if lost := sorted(set(own) - shapes.keys()):
            return Misfit(part, lost, len(own))
        for name in own:
            out, *rest = shapes[name]
            if sides[name] != (out, math.prod(rest)):
                return Misfit(part, [name], len(own), sides[name], shapes[name])
    return None


def motion_remedy(names: Iterable[str]) -> str:
    """What to do with a LoRA for motion that has no place, by the names of its modules."""
    is_motion = any("_motion_modules_" in name for name in names)
    return "; it moves films: give it to animate.py, with its motion_adapter" if is_motion else ""


def _refuse(path: str, misfit: Misfit, info: BaseInfo) -> NoReturn:
    if not misfit.shape:
        raise UserError(
            f"{path}: {len(misfit.names)} of {misfit.count} modules have no place in the {misfit.part} of "
            f"{info.name}, such as {some(misfit.names, 3)}{motion_remedy(misfit.names)}"
        )
    rows, columns = misfit.sides
    out, *rest = misfit.shape
    raise UserError(
        f"{path}: {misfit.names[0]} does not fit {info.name}: it changes {rows}x{columns} numbers, the base "
        f"has {out}x{math.prod(rest)} there"
    )
