"""A scene laid out on the picture: sky, mountains and ground as layers, before any style paints them."""

from dataclasses import dataclass

import numpy as np

from miniature.fields import Array, fractal_noise, grid, step, stream, value_noise
from miniature.ground import foreground
from miniature.scene import Scene
from miniature.terrain import Layer, ranges


@dataclass(frozen=True)
class View:
    """Everything that a style needs; fields are (size, size) float32, places in heights from the top left.

    disc         (x, y, radius) of sun or moon; its place also lights the sky when it is hidden
    clouds       coverage and light of the clouds
    stars        brightness of the stars
    behind       layers from back to front, down to the waterline
    water        whether a lake lies below `horizon`, with `ripples` (two fields)
    before       layers in front of it
    """

    scene: Scene
    size: int
    horizon: float
    side: int
    disc: tuple[float, float, float]
    clouds: tuple[Array, Array]
    stars: Array
    behind: list[Layer]
    water: bool
    ripples: tuple[Array, Array]
    before: list[Layer]


def lay_out(scene: Scene, size: int) -> View:
    """The geometry of a scene at `size` pixels a side."""
    rng = stream(scene.seed, "layout")
    horizon, side = rng.uniform(0.62, 0.71), -1 if rng.uniform() < 0.5 else 1
    low, high = {"noon": (0.1, 0.2), "night": (0.1, 0.26)}.get(scene.time, (0.2, 0.36))
    x, y = 0.5 + side * rng.uniform(0.12, 0.36), low + (high - low) * rng.uniform()
    radius = rng.uniform(0.042, 0.056)
    behind, before = foreground(scene, size, horizon, side)
    rng = stream(scene.seed, "ripples")
    waves = value_noise(rng, (size, size), (56, 7)), value_noise(rng, (size, size), (9, 2))
    return View(
        scene=scene,
        size=size,
        horizon=horizon,
        side=side,
        disc=(x, y, radius),
        clouds=_clouds(scene, size, horizon),
        stars=_stars(scene, size),
        behind=ranges(scene, size, horizon, side) + behind,
        water=scene.foreground == "a lake",
        ripples=waves,
        before=before,
    )


def _clouds(scene: Scene, size: int, horizon: float) -> tuple[Array, Array]:
    """Heaps that flatten towards the horizon; light where the cloud is thinner above than here."""
    if not scene.clouds:
        nothing = np.zeros((size, size), np.float32)
        return nothing, nothing
    rng = stream(scene.seed, "clouds")
    y, _ = grid(size)
    field = fractal_noise(rng, (size, size), (7, 3), 5, gain=0.55)
    field = field + 0.5 * value_noise(rng, (size, size), (4, 1))
    band = step(0.0, 0.06, y) * step(horizon - 0.08, horizon - 0.34, y)
    alpha = step(0.25, 1.15, field) * band
    lag = max(size // 40, 1)
    above = np.concatenate([field[:1].repeat(lag, axis=0), field[:-lag]])
    light = step(-0.6, 0.9, (field - above) + 0.35 - 0.25 * (field - 0.6))
    return (0.95 * alpha).astype(np.float32), light.astype(np.float32)


def _stars(scene: Scene, size: int) -> Array:
    """A few dozen soft points, brighter where there are fewer of them."""
    field = np.zeros((size, size), np.float32)
    if scene.time != "night":
        return field
    rng = stream(scene.seed, "stars")
    y, x = grid(size)
    for cx, cy, power in rng.uniform(size=(34, 3)):
        cy, r = 0.6 * cy, 0.003 + 0.0035 * power**3
        rows = slice(max(int((cy - 0.03) * size), 0), int((cy + 0.03) * size) + 1)
        columns = slice(max(int((cx - 0.03) * size), 0), int((cx + 0.03) * size) + 1)
        d2 = (y[rows] - cy) ** 2 + (x[:, columns] - cx) ** 2
        field[rows, columns] += (0.35 + 0.65 * power) * np.exp(-d2 / (2 * r * r))
    return np.clip(field, 0, 1)
