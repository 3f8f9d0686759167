"""Colours: what the light of each hour does to the sky and to each material. sRGB values from 0 to 1."""

from dataclasses import dataclass

import numpy as np

from miniature.fields import Array, colour, grid, mix
from miniature.terrain import Layer
from miniature.view import View


@dataclass(frozen=True)
class Hour:
    """The light of one time of day.

    sky      from zenith to horizon
    haze     what covers distant things
    sun      light of sun or moon, on what faces it
    ambient  light of the sky, on everything
    disc     sun or moon itself, and the glow around it
    cloud    lit and dark
    mist     share of haze at the foot of the mountains
    """

    sky: tuple[tuple[float, float, float], ...]
    haze: tuple[float, float, float]
    sun: tuple[float, float, float]
    ambient: tuple[float, float, float]
    disc: tuple[float, float, float]
    glow: tuple[float, float, float]
    cloud: tuple[tuple[float, float, float], tuple[float, float, float]]
    mist: float


# fmt: off
HOURS = {
    "dawn": Hour(
        sky=((0.47, 0.56, 0.77), (0.68, 0.68, 0.82), (0.92, 0.78, 0.80), (1.00, 0.87, 0.76)),
        haze=(0.86, 0.79, 0.84), sun=(0.62, 0.44, 0.36), ambient=(0.46, 0.46, 0.60), disc=(1.00, 0.95, 0.84),
        glow=(1.00, 0.84, 0.70), cloud=((1.00, 0.87, 0.84), (0.70, 0.66, 0.78)), mist=0.75),
    "noon": Hour(
        sky=((0.20, 0.43, 0.76), (0.36, 0.59, 0.87), (0.60, 0.78, 0.94), (0.82, 0.91, 0.96)),
        haze=(0.74, 0.84, 0.93), sun=(0.62, 0.59, 0.52), ambient=(0.40, 0.45, 0.55), disc=(1.00, 1.00, 0.94),
        glow=(1.00, 0.98, 0.90), cloud=((1.00, 1.00, 1.00), (0.72, 0.79, 0.88)), mist=0.25),
    "sunset": Hour(
        sky=((0.20, 0.22, 0.46), (0.48, 0.30, 0.50), (0.88, 0.44, 0.36), (1.00, 0.72, 0.36)),
        haze=(0.84, 0.47, 0.40), sun=(0.74, 0.42, 0.20), ambient=(0.34, 0.29, 0.44), disc=(1.00, 0.90, 0.56),
        glow=(1.00, 0.66, 0.30), cloud=((1.00, 0.62, 0.38), (0.48, 0.30, 0.46)), mist=0.40),
    "night": Hour(
        sky=((0.03, 0.05, 0.16), (0.06, 0.11, 0.26), (0.12, 0.19, 0.38), (0.24, 0.33, 0.52)),
        haze=(0.18, 0.25, 0.42), sun=(0.32, 0.38, 0.52), ambient=(0.12, 0.16, 0.28), disc=(0.98, 0.97, 0.88),
        glow=(0.50, 0.58, 0.78), cloud=((0.34, 0.40, 0.56), (0.12, 0.16, 0.29)), mist=0.35),
}

# Material: its colour, and the second one that `accent` mixes in.
MATERIALS = {
    "snowy":      ((0.40, 0.42, 0.48), (1.00, 1.00, 1.00)),
    "rocky":      ((0.60, 0.56, 0.52), (0.46, 0.46, 0.38)),
    "green":      ((0.24, 0.43, 0.19), (0.50, 0.62, 0.27)),
    "red desert": ((0.74, 0.34, 0.20), (0.90, 0.54, 0.34)),
    "meadow":     ((0.40, 0.60, 0.22), (0.90, 0.82, 0.34)),
    "forest":     ((0.10, 0.24, 0.17), (0.20, 0.40, 0.22)),
    "sand":       ((0.95, 0.77, 0.51), (0.80, 0.60, 0.40)),
    "tree":       ((0.10, 0.22, 0.14), (0.30, 0.46, 0.20)),
    "wall":       ((0.80, 0.68, 0.54), (0.80, 0.68, 0.54)),
    "roof":       ((0.62, 0.24, 0.18), (0.62, 0.24, 0.18)),
    "window":     ((0.24, 0.27, 0.33), (0.24, 0.27, 0.33)),
}
# fmt: on

LAMP = (1.0, 0.80, 0.40)  # a window that is lit from inside, at all hours but noon


def sky_colour(view: View, y: Array) -> Array:
    """The clear sky at heights y (H, 1): (3, H, 1)."""
    stops = np.array(HOURS[view.scene.time].sky, np.float32).T  # (3, stops)
    t = np.clip(y / view.horizon, 0, 1) * (stops.shape[1] - 1)
    low = np.minimum(t.astype(np.int32), stops.shape[1] - 2)
    return mix(stops[:, low], stops[:, low + 1], t - low)


def lit_colour(view: View, layer: Layer, light: Array, accent: Array) -> Array:
    """The layer's colour in this light, without haze: (3, h, W)."""
    hour = HOURS[view.scene.time]
    if layer.name == "window" and view.scene.time != "noon":
        return colour(LAMP)
    first, second = (colour(values) for values in MATERIALS[layer.name])
    return mix(first, second, accent) * (colour(hour.ambient) + colour(hour.sun) * light)


def haze_share(view: View, layer: Layer) -> Array:
    """How much haze covers a layer, (h, 1): more in the distance and, as mist, at the foot."""
    y = grid(view.size)[0][layer.rows]
    mist = HOURS[view.scene.time].mist * np.exp(-np.maximum(view.horizon - y, 0) / 0.09)
    far = 0.72 * layer.distance**1.2
    return np.clip(far + (1 - far) * mist * np.minimum(1.6 * layer.distance, 0.8), 0, 1)


def put(canvas: Array, layer: Layer, painted: Array) -> None:
    """Paint a layer's colour (3, h, W) onto the canvas, in place."""
    part = canvas[:, layer.rows]
    part += (painted - part) * layer.alpha
