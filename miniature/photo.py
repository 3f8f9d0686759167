"""The style "a photo": soft light, haze that grows with distance, a glow around the sun, a mirroring lake."""

import numpy as np

from miniature.fields import Array, colour, displaced, grid, mix, soft_blur, step
from miniature.palette import HOURS, haze_share, lit_colour, put, sky_colour
from miniature.terrain import Layer
from miniature.view import View


def paint_photo(view: View) -> Array:
    """(3, size, size) in [0, 1]."""
    canvas = _sky(view)
    for layer in view.behind:
        put(canvas, layer, _layer_colour(view, layer))
    if view.water:
        _mirror(view, canvas)
    for layer in view.before:
        put(canvas, layer, _layer_colour(view, layer))
    return _developed(view, canvas)


def _sky(view: View) -> Array:
    hour = HOURS[view.scene.time]
    y, x = grid(view.size)
    cx, cy, radius = view.disc
    distance = np.hypot(x - cx, y - cy)
    power = {"noon": 0.35, "night": 0.4 if view.scene.disc else 0.0}.get(view.scene.time, 0.8)
    near = 0.45 * view.scene.disc * np.exp(-((distance / 0.1) ** 2))
    canvas = mix(sky_colour(view, y), colour(hour.glow), power * (0.55 * np.exp(-distance / 0.22) + near))
    if view.scene.time == "night":
        canvas = np.maximum(canvas, view.stars * colour((0.95, 0.96, 1.0)))
    if view.scene.disc:
        canvas = mix(canvas, colour(hour.disc), np.clip((radius - distance) * view.size / 2 + 0.5, 0, 1))
    if view.scene.clouds:
        alpha, light = view.clouds
        lit, dark = (colour(values) for values in hour.cloud)
        canvas = mix(canvas, mix(dark, lit, light), 0.9 * alpha)
    return canvas.astype(np.float32)


def _layer_colour(view: View, layer: Layer) -> Array:
    texture = 0.05 * (1 - 0.6 * layer.distance) * layer.grain
    light = np.clip(layer.light + texture, 0, 1)
    painted = lit_colour(view, layer, light, layer.accent) * (1 + 0.9 * texture)
    return mix(painted, colour(HOURS[view.scene.time].haze), haze_share(view, layer))


def _mirror(view: View, canvas: Array) -> None:
    """Paint the lake: what stands above the waterline, upside down, broken by ripples that grow nearer."""
    size, shore = view.size, round(view.horizon * view.size)
    y = grid(size)[0][shore:]
    depth = np.maximum(y - view.horizon, 0)
    fine, broad = (field[shore:] for field in view.ripples)
    rows = (2 * view.horizon - y - 0.02 * depth * fine - 0.4 * np.maximum(depth - 0.30, 0)) * size
    still = np.arange(size - shore)[:, None]  # the row that `displaced` starts from
    mirror = displaced(canvas[:, :shore], rows - 0.5 - still, size * (0.002 + 0.05 * depth) * fine)
    mirror[:, 1:-1] = (mirror[:, :-2] + mirror[:, 1:-1] + mirror[:, 2:]) / 3
    tint = 0.80 * sky_colour(view, np.array([[0.35 * view.horizon]], np.float32))
    calm = np.clip(0.14 + 0.55 * depth + 0.16 * step(0.7, 1.8, broad) * (depth > 0.02), 0, 0.6)
    canvas[:, shore:] = mix(0.93 * mirror, tint, calm) * (1 - 0.35 * np.exp(-depth / 0.006))


def _developed(view: View, canvas: Array) -> Array:
    """Bloom, a little vignetting, and a gentle curve of contrast."""
    y, x = grid(view.size)
    canvas = canvas + 0.35 * soft_blur(np.maximum(canvas - 0.72, 0), 0.03 * view.size)
    canvas = np.clip(canvas * (1.03 - 0.28 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)), 0, 1)
    return canvas * (0.75 + canvas * (0.75 - 0.5 * canvas))
