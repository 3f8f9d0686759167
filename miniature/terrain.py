"""Mountains as height fields, seen from the front.

A range is a height field h(v, u): u runs across the picture (0 to 1), v from its foot (0) to its back (1).
Each peak is a pyramid of planes whose coordinates are bent by noise, so that crests wander; folded noise adds
gullies. A point stands on screen at y = base - h - tilt * v, and what is in front hides what is behind.
"""

from dataclasses import dataclass

import numpy as np

from miniature.fields import Array, fractal_noise, grid, ridged_noise, step, stream, value_noise
from miniature.scene import Scene

SLICES = 80  # rows of a height field, whatever the picture's size: shapes do not depend on it
DEPTH = 0.8  # how deep a range is, in widths of the picture
TILT = 0.06  # how much higher its back stands on screen than its foot, in heights of the picture


@dataclass(frozen=True)
class Layer:
    """One thing of the picture, painted over what is behind it; fields are (h, W) float32, h rows from `top`.

    name      its material
    top       first row of the picture that the fields describe; above and below them there is nothing of it
    alpha     coverage, 0 to 1
    light     0 in shadow, 1 in full light
    accent    share of the material's second colour: snow, strata, dry grass
    grain     texture of mean 0 and standard deviation near 1; what only a photograph shows
    distance  0 near to 1 at the horizon, for haze
    """

    name: str
    top: int
    alpha: Array
    light: Array
    accent: Array
    grain: Array
    distance: float

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + len(self.alpha))


def trimmed(
    name: str,
    alpha: Array,
    light: Array,
    accent: Array,
    grain: Array,
    distance: float,
    bottom: int | None = None,
) -> Layer:
    """A layer of fields of the whole picture, cut to the rows above `bottom` that show it."""
    filled = np.flatnonzero(alpha[:bottom].max(axis=1) > 0)
    rows = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 1)
    return Layer(name, rows.start, alpha[rows], light[rows], accent[rows], grain[rows], distance)


@dataclass(frozen=True)
class _Shape:
    """How the kinds of mountain differ in shape."""

    height: float
    slope: float
    sharpness: float
    gullies: float
    terraces: float


_SHAPES = {
    "snowy": _Shape(1.0, 1.0, 1.0, 0.30, 0.0),
    "rocky": _Shape(0.95, 1.05, 1.0, 0.42, 0.0),
    "green": _Shape(0.72, 0.72, 0.35, 0.22, 0.0),
    "red desert": _Shape(0.85, 1.25, 0.9, 0.22, 0.75),
}


def ranges(scene: Scene, size: int, horizon: float, side: int) -> list[Layer]:
    """The mountains from back to front.

    Args:
        size: pixels of the picture's side.
        horizon: where they stand, in heights of the picture from the top.
        side: -1 if the light comes from the left, 1 from the right.
    """
    plans = {
        "single": [(0.90, 0.10, 0.035), (0.30, 0.42, 0.0)],
        "range": [(0.78, 0.24, 0.03), (0.28, 0.31, 0.0)],
        "distant ranges": [(0.95, 0.20, 0.20), (0.78, 0.19, 0.13), (0.56, 0.17, 0.065), (0.3, 0.12, 0.0)],
    }
    return [
        _range(scene, size, number, (distance, height, horizon - lift), horizon, side)
        for number, (distance, height, lift) in enumerate(plans[scene.layers])
    ]


def _range(
    scene: Scene, size: int, number: int, place: tuple[float, float, float], horizon: float, side: int
) -> Layer:
    distance, height, base = place
    name = f"mountain/{scene.layers}/{number}"
    lone = scene.layers == "single" and number == 1
    h = _height_field(scene, size, name, height, lone)  # (V, W)
    light = _light(h, side, steep=1.0 / max(height, 0.15))
    accent = _accent(scene, name, h, height, light)
    grain = fractal_noise(stream(scene.seed, f"{name}/grain"), h.shape, (12, 16), 3)
    rows, alpha = _project(h, base, size)
    hidden = round((horizon + (0.0 if scene.foreground == "a lake" else 0.1)) * size)
    filled = np.flatnonzero(alpha[:hidden].max(axis=1) > 0)
    part = slice(filled[0], hidden) if len(filled) else slice(hidden - 1, hidden)
    light, accent, grain = _seen((light, accent, grain), rows[part])
    return Layer(scene.mountain, part.start, alpha[part], light, accent, grain, distance)


def _height_field(scene: Scene, size: int, name: str, height: float, lone: bool) -> Array:
    """(V, W), in heights of the picture."""
    shape, kind = (SLICES, size), _SHAPES[scene.mountain]
    rng = stream(scene.seed, f"{name}/warp")
    u = grid(size)[1] + 0.035 * fractal_noise(rng, shape, (4, 5), 3)
    v = DEPTH * np.linspace(0, 1, SLICES, dtype=np.float32)[:, None] + 0.05 * fractal_noise(
        rng, shape, (4, 5), 3
    )
    peaks = _peaks(stream(scene.seed, f"{name}/peaks"), height * kind.height, lone)
    h = np.zeros(shape, np.float32)
    rng = stream(scene.seed, f"{name}/faces")
    for peak in peaks:
        h = _smooth_max(h, _pyramid(rng, u, v, peak, kind), 0.02 + 0.05 * (1 - kind.sharpness))
    folds = ridged_noise(stream(scene.seed, f"{name}/gullies"), shape, (5, 7), 3) - 0.45
    h = h * (1 + kind.gullies * folds) + 0.012 * folds
    h = h * step(
        -0.02, 0.3, np.linspace(0, 1, SLICES, dtype=np.float32)[:, None]
    )  # the foot meets the ground
    return _terraced(scene, name, h, height) if kind.terraces else h


def _peaks(rng: np.random.Generator, height: float, lone: bool) -> list[tuple[float, float, float]]:
    """(u, v, height) of each peak, the highest first."""
    if lone:
        u = rng.uniform(0.32, 0.68)
        main = [(u, 0.42, height)]
        shoulders = [
            (u + s * rng.uniform(0.2, 0.34), rng.uniform(0.25, 0.5), height * rng.uniform(0.32, 0.55))
            for s in (-1, 1)
        ]
        return main + shoulders
    count = int(rng.integers(4, 7))
    slots = (np.arange(count) + rng.uniform(0.15, 0.85, count)) / count
    heights = height * rng.uniform(0.55, 1.0, count)
    heights[rng.integers(count)] = height * rng.uniform(1.0, 1.15)
    depths = rng.uniform(0.2, 0.55, count)
    return list(zip(slots.tolist(), depths.tolist(), heights.tolist(), strict=True))


def _pyramid(
    rng: np.random.Generator, u: Array, v: Array, peak: tuple[float, float, float], kind: _Shape
) -> Array:
    """Height of a peak less the distance to it, in a norm whose ball is an uneven polygon: flat faces."""
    u0, v0, height = peak
    faces, turn = int(rng.integers(4, 6)), rng.uniform(0, 2 * np.pi)
    angles = turn + 2 * np.pi * (np.arange(faces) + rng.uniform(-0.25, 0.25, faces)) / faces
    slopes = kind.slope * rng.uniform(0.75, 1.25, faces) * (0.75 + 0.9 * height)
    du, dv = u - u0, v - v0
    drop = np.zeros_like(du + dv)
    for angle, slope in zip(angles, slopes, strict=True):
        drop = np.maximum(drop, slope * (np.cos(angle) * du + np.sin(angle) * dv).astype(np.float32))
    if kind.sharpness < 1:  # round tops: the norm's tip becomes a bowl
        r = 0.12 * (1 - kind.sharpness)
        drop = np.sqrt(drop * drop + r * r) - 0.6 * r
    return height - drop


def _smooth_max(a: Array, b: Array, width: float) -> Array:
    """The larger of two heights, with a rounded valley `width` deep where they meet."""
    share = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return a + (b - a) * share + width * share * (1 - share)


def _terraced(scene: Scene, name: str, h: Array, height: float) -> Array:
    """Tables: heights pile up at a few levels, with cliffs between them and scree below."""
    rng = stream(scene.seed, f"{name}/terraces")
    levels = 3.0 / height
    x = h * levels + 0.12 * value_noise(rng, h.shape, (3, 5))
    whole = np.floor(x)
    part = x - whole
    cliff = whole + 0.35 * part + 0.65 * step(0.25, 0.6, part)
    return np.where(h > 0, (0.3 * x + 0.7 * cliff) / levels, h).astype(np.float32)


def _light(h: Array, side: int, steep: float) -> Array:
    """Lambert's cosine on the height field, and the shadows that crests cast across the picture; (V, W)."""
    slices, width = h.shape
    du = np.gradient(h, axis=1) * width
    dv = np.gradient(h, axis=0) * (slices / DEPTH)
    lx, lv, ly = 0.72 * side, -0.38, 0.58  # towards the light: to a side, a little from the viewer, down
    cosine = (ly - lx * du - lv * dv) / np.sqrt(1 + du * du + dv * dv)
    # A ray that grazes a crest falls by `fall` per width; in shadow is whatever lies below the highest ray.
    fall = 0.62
    x = fall * grid(width)[1]
    ordered = h + x if side < 0 else (h - x)[:, ::-1]
    rays = np.maximum.accumulate(ordered, axis=1)
    rays = rays - x if side < 0 else rays[:, ::-1] + x
    lit = step(0.035, 0.004, rays - h)
    return (step(-0.05, 0.95, cosine) * (0.25 + 0.75 * lit)).astype(np.float32)


def _accent(scene: Scene, name: str, h: Array, height: float, light: Array) -> Array:
    """Where the second colour lies: snow on what is high and not too steep, strata by height, turf below."""
    rng = stream(scene.seed, f"{name}/accent")
    noise = fractal_noise(rng, h.shape, (6, 8), 3)
    level = h / height
    slices, width = h.shape
    steepness = np.hypot(np.gradient(h, axis=1) * width, np.gradient(h, axis=0) * (slices / DEPTH))
    if scene.mountain == "snowy":
        return step(0.18, 0.34, level + 0.09 * noise - 0.10 * (steepness - 0.9))
    if scene.mountain == "red desert":
        bands = np.sin(level * 26 + 0.5 * noise) + 0.5 * np.sin(level * 61 + 2)
        return step(-0.2, 1.0, bands)
    if scene.mountain == "rocky":
        return step(0.0, 1.2, noise + 2.2 * (0.35 - level))  # scree and turf at the foot
    return step(-0.3, 1.1, noise + 1.2 * (level - 0.4))


def _project(h: Array, base: float, size: int) -> tuple[Array, Array]:
    """What the viewer sees: for each pixel the slice, as a fraction of slices (size, W); and coverage.

    M_k, the highest point on screen of slices up to k, falls with k; a pixel at y sees the first slice with
    M_k <= y, and lies between it and the one before.
    """
    tilt = TILT * np.linspace(0, 1, len(h), dtype=np.float32)[:, None]
    m = np.minimum.accumulate((base - h - tilt) * size, axis=0)  # (V, W), pixels
    y = np.arange(size, dtype=np.float32) + 0.5
    first = np.clip(np.ceil(m - 0.5), 0, size).astype(np.int64)  # the first row at or below that height
    width = m.shape[1]
    flat = first * width + np.arange(width)
    counts = np.bincount(flat.ravel(), minlength=(size + 1) * width).reshape(size + 1, width)
    front = len(h) - np.cumsum(counts, axis=0)[:size]  # (size, W): slices that stand below the row
    after = np.clip(front, 0, len(h) - 1)
    before = np.maximum(after - 1, 0)
    columns = np.arange(width)
    m0, m1 = m[before, columns], m[after, columns]
    share = np.clip((m0 - y[:, None]) / np.maximum(m0 - m1, 1e-3), 0, 1)
    alpha = np.clip(y[:, None] - m[-1] + 0.5, 0, 1)
    return (before + share * (after - before)).astype(np.float32), alpha.astype(np.float32)


def _seen(fields: tuple[Array, ...], rows: Array) -> list[Array]:
    """Fields (V, W) of the range as they appear on screen, each (h, W)."""
    low = rows.astype(np.int32)
    width = fields[0].shape[1]
    flat = low * width + np.arange(width, dtype=np.int32)
    share = rows - low
    seen = []
    for field in fields:
        ahead = np.concatenate([np.diff(field, axis=0), np.zeros_like(field[:1])])
        seen.append(field.ravel().take(flat) + ahead.ravel().take(flat) * share)
    return seen
