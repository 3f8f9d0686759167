"""The captions of a base with a closed vocabulary, as captions.json in its folder has them. No torch."""

import json
from dataclasses import dataclass

from lorakit.weights.base import BaseInfo
from lorakit.weights.part_files import BaseError

FILE = "captions.json"


@dataclass(frozen=True)
class Vocabulary:
    """A caption is `start`, and then one of each of `parts`, joined as they stand."""

    start: str
    parts: tuple[tuple[str, ...], ...]


def read_vocabulary(info: BaseInfo) -> Vocabulary | None:
    """That of a base; None where it has no closed one, as Stable Diffusion has not.

    Raises:
        BaseError: the file is not what it should be.
    """
    path = info.root / FILE if info.root else None
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(tuple(map(str, options)) for options in data["parts"])
        assert parts and all(parts)
        return Vocabulary(str(data["start"]), parts)
    except (ValueError, LookupError, TypeError, AssertionError):
        raise BaseError(f'{path}: needs "start", a text, and "parts", lists of texts') from None
