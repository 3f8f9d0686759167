"""Things in a picture moved or stretched, pixel by pixel, and the place that they leave filled. No torch.

A picture is (H, W, C) float32. A point is (x, y) in pixels, the middle of the first one at (0.5, 0.5). A
field is (H, W, 2): by how much (x, y) of what is shown at a place stood elsewhere before. Outside of a mask,
(H, W) bool, nothing changes, to the bit; a way of no length changes nothing at all.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Point: TypeAlias = tuple[float, float]
Way: TypeAlias = tuple[Point, Point]
"""From a handle to its target."""

SOFT = 1.5
"""Pixels over which the rim of a moved thing fades."""


# ---- places ----


def distance_to(shape: tuple[int, int], way: Way) -> Array:
    """(H, W) float32, of each pixel to the straight way between two points, or to one point."""
    (x0, y0), (x1, y1) = way
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64) + 0.5
    dx, dy = x1 - x0, y1 - y0
    length = dx * dx + dy * dy
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / length, 0, 1) if length else 0.0
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy).astype(np.float32)


def capsule(shape: tuple[int, int], ways: Sequence[Way], radius: float) -> Array:
    """(H, W) bool: what lies within `radius` of a way."""
    return np.logical_or.reduce([distance_to(shape, way) <= radius for way in ways])


def disc(shape: tuple[int, int], centre: Point, radius: float) -> Array:
    """(H, W) float32: 1 within `radius`, 0 from SOFT pixels further on."""
    away = distance_to(shape, (centre, centre))
    return np.clip((radius + SOFT - away) / SOFT, 0, 1).astype(np.float32)


# ---- what is seen elsewhere ----


def sample(picture: Array, field: Array) -> Array:
    """The picture as the field shows it: bilinear, its rim going on outside."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    x, y = np.clip(x - field[..., 0], 0, width - 1), np.clip(y - field[..., 1], 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, low = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    a, b = (x - left)[..., None], (y - top)[..., None]
    upper = (1 - a) * picture[top, left] + a * picture[top, right]
    lower = (1 - a) * picture[low, left] + a * picture[low, right]
    return ((1 - b) * upper + b * lower).astype(np.float32)


def constant(shape: tuple[int, int], way: Way) -> Array:
    """The field that moves everything along a way."""
    (x0, y0), (x1, y1) = way
    return np.broadcast_to(np.array([x1 - x0, y1 - y0], np.float32), (*shape, 2))


def fill(picture: Array, hole: Array, rounds: int = 400) -> Array:
    """The picture with a hole, (H, W) bool, filled from its rim: harmonic, so that it has no edge of its own.

    Successive over-relaxation by turns on the two colours of a chessboard, from the mean of the rim.
    """
    if not hole.any():
        return picture
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    part = np.s_[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
    values, inside = picture[part].astype(np.float64), hole[part]
    rim = values[~inside]
    values[inside] = rim.mean(0) if len(rim) else 0.0
    chess = np.indices(inside.shape).sum(0) % 2
    turns = [inside & (chess == colour) for colour in (0, 1)]
    omega = 2 / (1 + np.sin(np.pi / max(inside.shape)))
    for _ in range(rounds):
        for turn in turns:
            p = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
            mean = (p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]) / 4
            values[turn] += omega * (mean - values)[turn]
    filled = picture.copy()
    filled[part][inside] = values[inside].astype(np.float32)
    return filled


# ---- the two kinds of drag ----


def move(picture: Array, ways: Sequence[Way], radius: float, mask: Array) -> Array:
    """What lies within `radius` of each handle stands at its target; where it was is filled from around."""
    ways = [way for way in ways if way[0] != way[1]]
    shape = (picture.shape[0], picture.shape[1])
    holes = [disc(shape, start, radius) > 0 for start, _ in ways]
    hole = np.logical_or.reduce([np.zeros(shape, bool), *holes]) & mask
    moved = fill(picture, hole)
    for start, end in ways:
        share = (disc(shape, end, radius) * mask)[..., None]
        moved = (1 - share) * moved + share * sample(picture, constant(shape, (start, end)))
    return np.where(mask[..., None], moved, picture).astype(np.float32)


def stretch_field(ways: Sequence[Way], mask: Array) -> Array:
    """The field that is a way's whole length at its target, and falls to nothing at the mask's edge.

    A way's share is D / (D + d), with D the distance to the edge and d that to its target; of several ways
    the nearest targets count most (weights 1 / d^2, Shepard 1968).
    """
    edge = distance_to_edge(mask)
    away = np.stack([distance_to(mask.shape, (end, end)) for _, end in ways]).astype(np.float64) + 1e-6
    share = np.where(edge > 0, edge / (edge + away), 0)  # (ways, H, W)
    weight = away**-2 / (away**-2).sum(0)
    steps = np.array([[x1 - x0, y1 - y0] for (x0, y0), (x1, y1) in ways])
    return np.einsum("nhw,nc->hwc", share * weight, steps).astype(np.float32)


def stretch(picture: Array, ways: Sequence[Way], mask: Array) -> Array:
    """Each handle drawn to its target, and all between there and the mask's edge with it."""
    stretched = sample(picture, stretch_field(ways, mask))
    return np.where(mask[..., None], stretched, picture).astype(np.float32)


def distance_to_edge(mask: Array) -> Array:
    """(H, W) float64: how far each pixel inside lies from the nearest one outside; 0 outside.

    The picture's own rim is no edge, unless nothing lies outside of the mask: then it is.
    """
    if mask.all():
        y, x = np.indices(mask.shape)
        height, width = mask.shape
        return np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)).astype(np.float64)
    outside, inside = np.argwhere(_grow(mask) & ~mask), np.argwhere(mask)
    found = np.zeros(mask.shape)
    for part in np.array_split(inside, max(1, len(inside) // 4096)):
        squared = ((part[:, None] - outside[None]) ** 2).sum(2).min(1)
        found[part[:, 0], part[:, 1]] = np.sqrt(squared)
    return found


def _grow(mask: Array) -> Array:
    """The mask and the pixels beside it."""
    p = np.pad(mask, 1)
    return p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]


def exchange(values: Array, ways: Sequence[Way], radius: float) -> Array:
    """Noise (H, W, C) moved along: every place of a target has the handle's, and what was there goes where
    the handle's was. It is the same numbers in another order, so that it stays noise.
    """
    found, shape = values.copy(), (values.shape[0], values.shape[1])
    for start, end in ways:
        step = round(end[1] - start[1]), round(end[0] - start[0])
        here = np.argwhere(distance_to(shape, (start, start)) <= radius)
        here = here[((here + step >= 0) & (here + step < shape)).all(1)]
        old, new = {*map(tuple, here.tolist())}, {*map(tuple, (here + step).tolist())}
        before = found.copy()
        for i, j in old:
            found[i + step[0], j + step[1]] = before[i, j]
        for place, source in zip(sorted(old - new), sorted(new - old), strict=True):
            found[place] = before[source]
    return found
