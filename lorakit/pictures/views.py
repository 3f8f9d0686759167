"""How a picture is shown to the model: its bucket, its crop, the name of its cache entry. No torch here."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL.Image import Image

from lorakit.ground.randomness import uniform
from lorakit.pictures.folder import Row
from lorakit.pictures.images import crop, resize_to_cover, to_array

CACHE_VERSION = 1
Shape = tuple[int, int]  # width, height in pixels


def bucket_shapes(resolution: int, multiple: int, max_aspect: float = 2.5) -> list[Shape]:
    """Every bucket: sides divide by `multiple`, the area is at most `resolution` squared."""
    shapes = set()
    for width in range(multiple, int(resolution * max_aspect) + 1, multiple):
        height = resolution * resolution // width // multiple * multiple
        if height and max(width / height, height / width) <= max_aspect:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes) or [(resolution, resolution)]


def assign_shapes(
    sizes: Iterable[Shape], resolution: int, multiple: int, buckets: bool, max_aspect: float = 2.5
) -> list[Shape]:
    """The shape that each picture is trained at: the bucket of the nearest aspect, or a square."""
    if not buckets:
        square = (resolution, resolution)
        return [square for _ in sizes]
    shapes = bucket_shapes(resolution, multiple, max_aspect)

    def distance(shape: Shape, aspect: float) -> tuple[float, int]:  # of two equal aspects, the larger bucket
        return abs(math.log(shape[0] / shape[1] / aspect)), -shape[0] * shape[1]

    @cache
    def nearest(aspect: float) -> Shape:
        return min(shapes, key=partial(distance, aspect=aspect))

    return [nearest(width / height) for width, height in sizes]


def share_lost(size: Shape, shape: Shape) -> float:
    """The share of a picture that sticks out of its shape and is cropped."""
    ratio = size[0] * shape[1] / (size[1] * shape[0])
    return 1 - min(ratio, 1 / ratio)


def entry_key(*parts) -> bytes:
    """The name of an entry in a shard, 20 bytes: a hash of everything that its content depends on."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).digest()[:20]


def entry_name(*parts) -> str:
    """The file name of a cache entry, from the same hash."""
    return entry_key(*parts).hex() + ".safetensors"


@dataclass(frozen=True, slots=True)
class View:
    """One picture as the VAE sees it: resized to cover `shape`, cropped to it, mirrored or not.

    `offset` is where the crop lies in what sticks out: (0, 0) left and top, (1, 1) right and bottom.
    """

    row: Row
    shape: Shape
    offset: tuple[float, float] = (0.5, 0.5)
    flip: bool = False

    def entry(self, vae_hash: str, dtype: str = "float32") -> bytes:
        """The name under which its moments are cached."""
        return entry_key(self.row.sha256, self.shape, self.offset, self.flip, vae_hash, dtype)

    def pixels(self, image: Image) -> np.ndarray:
        """(3, H, W) in [-1, 1] of the picture `image`."""
        width, height = self.shape
        image = resize_to_cover(image, width, height)
        left, top = (
            round(o * (side - part))
            for o, side, part in zip(self.offset, image.size, self.shape, strict=True)
        )
        array = to_array(crop(image, width, height, left, top))
        return array[..., ::-1].copy() if self.flip else array


def views_of(row: Row, shape: Shape, *, flip: bool = False, crops: int = 1) -> list[View]:
    """The views of a picture that are cached, the centre crop first; further crops lie at random.

    Crops are made before the VAE and not from its latents: its normalization looks at the whole picture, so
    that a crop of latents decodes several dB worse than the latents of the crop (docs/LOG.md).
    """
    offsets = [(0.5, 0.5)]
    if row.width * shape[1] != row.height * shape[0]:  # something sticks out
        draw = partial(uniform, 0, "crop", row.sha256)
        offsets += [(round(draw(k, "x"), 4), round(draw(k, "y"), 4)) for k in range(1, crops)]
    flips = (False, True) if flip else (False,)
    return [View(row, shape, offset, mirrored) for offset in offsets for mirrored in flips]
