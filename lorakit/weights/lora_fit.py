"""Whether a LoRA file fits a base, told by the headers of both. No torch here."""

import math
from collections import Counter, defaultdict

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.base import BaseInfo
from lorakit.weights.lora_file import component_of, kohya_name
from lorakit.weights.lora_foreign import refuse_foreign, some
from lorakit.weights.lora_keys import parse_key
from lorakit.weights.lora_metadata import Component
from lorakit.weights.tensors import read_header

Slots = dict[str, tuple[int, ...]]


def fit_of(path: str, info: BaseInfo) -> str:
    """A LoRA in words: modules, ranks, parameters, and that each module has its place in the base.

    What no header tells is left to the reader: factors other than LoRA's, modules by number.

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
    if plain:
        _check(path, plain, info)
    return f"{said}, {'fits' if len(plain) == len(modules) else 'fits as far as its header tells'}"


def _check(path: str, modules: dict[str, Slots], info: BaseInfo) -> None:
    parts: list[Component] = list(dict.fromkeys(component_of(name) for name in modules))
    for part in parts:
        weights = {
            kohya_name(part, key.removesuffix(".weight")): shape
            for key, shape in info.shapes(part).items()
            if key.endswith(".weight")
        }
        own = {name: slots for name, slots in modules.items() if component_of(name) == part}
        if lost := sorted(own.keys() - weights.keys()):
            raise UserError(
                f"{path}: {len(lost)} of {len(own)} modules have no place in the {part} of {info.name}, such "
                f"as {some(lost, 3)}"
            )
        for name, slots in own.items():
            out, *rest = weights[name]
            sides = slots["up"][0], math.prod(slots["down"][1:])
            if sides != (out, math.prod(rest)):
                raise UserError(
                    f"{path}: {name} does not fit {info.name}: it changes {sides[0]}x{sides[1]} numbers, the "
                    f"base has {out}x{math.prod(rest)} there"
                )
