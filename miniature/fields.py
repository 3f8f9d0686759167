"""Smooth random fields and small image operations on numpy arrays; the renderer's brushes.

Fields are (H, W) float32 and pictures (3, H, W) in [0, 1]. Random fields are made of lattices that are
stretched over the whole picture, so the same generator draws the same field at every size.
"""

import numpy as np
from PIL import Image

from lorakit.ground.randomness import derive_seed

Array = np.ndarray


def stream(seed: int, name: str, *index: int | str) -> np.random.Generator:
    """The random numbers of one part of a scene; no other part can shift them."""
    return np.random.default_rng(derive_seed(seed, f"landscape/{name}", *index))


def resize(
    field: Array, shape: tuple[int, int], filter: Image.Resampling = Image.Resampling.BICUBIC
) -> Array:
    """A field stretched or shrunk to `shape` (H, W)."""
    image = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), filter))


def value_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Noise of mean 0 and variance near 1 with `cells` (rows, columns) blobs across the picture."""
    return 1.3 * resize(rng.standard_normal((cells[0] + 1, cells[1] + 1)), shape)


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int], octaves: int, gain: float = 0.5
) -> Array:
    """Octaves of value noise, each twice as fine and `gain` times as strong; variance near 1."""
    # Drawn no finer than its finest octave needs, then stretched: several times as fast on a large picture.
    inner = min(shape[0], 4 * cells[0] << (octaves - 1)), min(shape[1], 4 * cells[1] << (octaves - 1))
    total = sum(gain ** (2 * k) for k in range(octaves)) ** 0.5
    field = np.zeros(inner, np.float32)
    for k in range(octaves):
        field += gain**k / total * value_noise(rng, inner, (cells[0] << k, cells[1] << k))
    return field if inner == shape else resize(field, shape)


def ridged_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int], octaves: int
) -> Array:
    """Noise with sharp crests, about 0 to 1 (Musgrave 2003, Texturing and Modeling, ridged multifractal).

    Each octave is folded at zero, and fades in the hollows of the one before.
    """
    field, weight, total = np.zeros(shape, np.float32), np.ones(shape, np.float32), 0.0
    for k in range(octaves):
        crest = 1 - np.minimum(np.abs(value_noise(rng, shape, (cells[0] << k, cells[1] << k))), 1)
        field += 0.5**k * weight * crest**2
        total += 0.5**k
        weight = np.clip(1.6 * crest, 0, 1)
    return field / total


def step(low: float, high: float, field: Array) -> Array:
    """Smooth step from 0 at `low` to 1 at `high` (downward if high < low)."""
    t = np.clip((field - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, share: Array | float) -> Array:
    """a where share is 0, b where it is 1."""
    return a + (b - a) * share


def colour(values: tuple[float, ...]) -> Array:
    """A colour (3, 1, 1) that spreads over a picture (3, H, W)."""
    return np.array(values, np.float32)[:, None, None]


def blur(field: Array, radius: float) -> Array:
    """Two box filters along each axis: close to a Gaussian of standard deviation `radius` pixels."""
    half = int(round(1.2 * radius))
    if half < 1:
        return field
    for axis in (field.ndim - 1, field.ndim - 2):
        for _ in range(2):
            field = _box(field, half, axis)
    return field


def _box(field: Array, half: int, axis: int) -> Array:
    pad = [(0, 0)] * field.ndim
    pad[axis] = (half + 1, half)
    total = np.cumsum(np.pad(field, pad, mode="edge"), axis=axis, dtype=np.float32)
    width = 2 * half + 1
    upper, lower = [slice(None)] * field.ndim, [slice(None)] * field.ndim
    upper[axis], lower[axis] = slice(width, None), slice(None, -width)
    return (total[tuple(upper)] - total[tuple(lower)]) / width


def soft_blur(picture: Array, radius: float) -> Array:
    """A wide blur of a picture (3, H, W), made at a quarter of its size; H and W are multiples of 4."""
    c, h, w = picture.shape
    small = picture.reshape(c, h // 4, 4, w // 4, 4).mean(axis=(2, 4))
    return np.stack([resize(plane, (h, w)) for plane in blur(small, radius / 4)])


def displaced(field: Array, dy: Array, dx: Array) -> Array:
    """For each pixel of dy, dx (h, W) the field at (y + dy, x + dx), nearest pixel, clamped at the border."""
    height, width = field.shape[-2:]
    rows = np.clip(np.arange(len(dx))[:, None] + np.rint(dy).astype(np.int32), 0, height - 1)
    columns = np.clip(np.arange(width)[None] + np.rint(dx).astype(np.int32), 0, width - 1)
    flat = rows * width + columns
    return field.reshape(*field.shape[:-2], -1).take(flat, axis=-1)


def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres as (y, x), each (size, 1) or (1, size), in units of the picture's side, y downward."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return line[:, None], line[None]
