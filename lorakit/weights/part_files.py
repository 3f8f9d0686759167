"""The files that hold a base's parts, and where in them tensors lie. Only reading a tensor takes torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.errors import OutputError, UserError
from lorakit.weights.original_names import plain_name
from lorakit.weights.tensors import Shapes, read_header

if TYPE_CHECKING:
    import torch

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class BaseError(UserError):
    """The base model cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a part lies: whole under `key`, or the `third` of three that are stacked there."""

    path: Path
    key: str
    shape: tuple[int, ...]
    third: int | None = None

    def rows(self) -> slice:
        count = self.shape[0]
        return slice(None) if self.third is None else slice(self.third * count, (self.third + 1) * count)


Places = dict[str, Place]


def read_places(places: Mapping[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every place, in the file's dtype; whole tensors are mapped, not copied.

    Raises:
        BaseError: a file is damaged.
    """
    import safetensors

    files = {}
    for name, place in places.items():
        try:
            if place.path not in files:
                files[place.path] = safetensors.safe_open(place.path, "pt")
            tensor = files[place.path].get_tensor(place.key)
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise BaseError(f"{place.path}: {place.key} cannot be read ({error}); fetch it again") from None
        yield name, tensor[place.rows()].reshape(place.shape)


def read_json(path: Path) -> dict:
    """Raises BaseError: no file, or no JSON object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; is the base's download complete?") from None
    except (ValueError, RecursionError) as error:
        raise BaseError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BaseError(f"{path}: holds no JSON object; is the base's download complete?")
    return content


def read_shapes(path: Path) -> Shapes:
    """Raises BaseError: not a whole safetensors file. OutputError: it cannot be read."""
    try:
        return read_header(path)[0]
    except OutputError:
        raise
    except UserError as error:
        raise BaseError(str(error)) from None


def candidates(part: str) -> tuple[str, ...]:
    """Names of a part's weights in its folder: full precision first, then fp16, then the index of shards."""
    stem = WEIGHTS[part]
    return f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.json"


def weights_file(root: Path, part: str) -> Path:
    """The first of `candidates` that is there.

    Raises:
        BaseError: none is, or it is not a whole safetensors file.
    """
    names = candidates(part)
    for name in names:
        path = root / part / name
        if path.exists():
            if path.suffix == ".safetensors":
                read_shapes(path)
            return path
    pickled = sorted(p.name for p in (root / part).glob("*.bin"))
    if pickled:
        raise BaseError(
            f"{root / part}: only pickled weights ({pickled[0]}), which are not read; "
            f"convert them to {names[0]} or take a base that ships safetensors"
        )
    raise BaseError(f"{root / part}: no weights ({names[0]}); is the base's download complete?")


def shards(path: Path) -> list[Path]:
    """The safetensors files of a weights file: itself, or what an index names."""
    if path.suffix == ".safetensors":
        return [path]
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BaseError(f"{path}: names no shards (weight_map); is the base's download complete?")
    return sorted({path.parent / shard for shard in found.values()})


def weight_shapes(path: Path) -> Shapes:
    """The shape of every tensor of a weights file (of every shard, for an index), from the headers alone.

    Raises:
        BaseError: a file is missing, or is not a whole safetensors file.
        OutputError: a file cannot be read.
    """
    return {name: shape for each in shards(path) for name, shape in read_shapes(each).items()}


def folder_places(path: Path, part: str) -> Places:
    """Where each tensor of a part lies, by its name of today. Raises what `weight_shapes` raises."""
    found = {}
    for each in shards(path):
        for key, shape in read_shapes(each).items():
            if name := plain_name(part, key):
                found[name] = Place(each, key, shape)
    return found
