"""Styles of wet paint on paper: a watercolor, and a drawing in brush and ink."""

import numpy as np

from miniature.fields import (
    Array,
    blur,
    colour,
    displaced,
    fractal_noise,
    grid,
    mix,
    step,
    stream,
    value_noise,
)
from miniature.palette import HOURS, haze_share, lit_colour, sky_colour
from miniature.prints import saturated
from miniature.terrain import Layer
from miniature.view import View

PAPER = (0.975, 0.960, 0.925)
RICE_PAPER = (0.955, 0.940, 0.895)


def paint_watercolor(view: View) -> Array:
    """(3, size, size): washes of pigment that pool at their edges, on grained paper with a bare margin.

    What adds up is the density of pigment, -log of the colour that it transmits (Beer and Lambert).
    """
    paper = _Paper(view)
    density = _density(_wet_sky(view))
    for layer in view.behind:
        _wash(view, paper, density, layer)
    if view.water:
        _wet_lake(view, density)
    for layer in view.before:
        _wash(view, paper, density, layer)
    uneven = (0.20 * paper.blooms + 0.06 * paper.grain) / (1 + 0.35 * density)  # dark paint covers the grain
    density *= np.maximum(1 + uneven, 0) * paper.painted
    return colour(PAPER) * np.exp(-0.80 * density)


class _Paper:
    """What the sheet does to paint: `wander` (pixels down, right), `blooms`, `grain`, `painted` or bare."""

    def __init__(self, view: View):
        size, shape = view.size, (view.size, view.size)
        rng = stream(view.scene.seed, "paper")
        down, right = (0.0055 * size * fractal_noise(rng, shape, (14, 14), 2) for _ in range(2))
        self.wander = down, right
        self.blooms = fractal_noise(rng, shape, (4, 4), 3)
        self.grain = value_noise(rng, shape, (72, 72))
        y, x = grid(size)
        edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) + 0.008 * fractal_noise(
            rng, shape, (9, 9), 3
        )
        self.painted = step(0.018, 0.034, edge)


def _density(picture: Array) -> Array:
    return -np.log(np.clip(picture, 0.03, 1))


def _wet_sky(view: View) -> Array:
    hour = HOURS[view.scene.time]
    y, x = grid(view.size)
    cx, cy, radius = view.disc
    distance = np.hypot(x - cx, y - cy)
    canvas = sky_colour(view, y) * np.ones((1, 1, view.size), np.float32)
    canvas = mix(canvas, colour(hour.glow), 0.6 * np.exp(-distance / 0.16))
    if view.scene.clouds:  # clouds are left bare, with a shaded belly
        alpha, light = (blur(field, 0.012 * view.size) for field in view.clouds)
        lit, dark = (colour(values) for values in hour.cloud)
        canvas = mix(canvas, mix(dark, 0.4 * lit + 0.6, step(0.3, 0.8, light)), step(0.1, 0.8, alpha))
    if view.scene.time == "night":
        canvas = np.maximum(canvas, 0.8 * step(0.3, 0.7, view.stars))
    if view.scene.disc:
        canvas = mix(
            canvas, colour(hour.disc), np.clip((1.1 * radius - distance) * view.size / 3 + 0.5, 0, 1)
        )
    return canvas.astype(np.float32)


def _wash(view: View, paper: _Paper, density: Array, layer: Layer) -> None:
    """Lay one layer over what is painted, in place."""
    alpha = displaced(layer.alpha, *(field[layer.rows] for field in paper.wander))
    soft = 0.010 * view.size
    light = blur(layer.light, soft)
    light = 0.15 + 0.42 * step(0.25, 0.45, light) + 0.38 * step(0.55, 0.75, light)
    accent = blur(layer.accent, soft) if layer.name == view.scene.mountain else layer.accent
    painted = saturated(lit_colour(view, layer, light, accent), 1.12)
    haze = colour(HOURS[view.scene.time].haze)
    own = _density(mix(painted, haze, 0.66 * layer.distance))
    pooled = np.clip(1 - blur(alpha, 0.008 * view.size), 0, 1) * alpha  # pigment dries at the border
    part = density[:, layer.rows]
    part += (own * (1 + 0.85 * pooled) - part) * alpha


def _wet_lake(view: View, density: Array) -> None:
    size, shore = view.size, round(view.horizon * view.size)
    y = grid(size)[0][shore:]
    depth = np.maximum(y - view.horizon, 0)
    rows = (2 * view.horizon - y) * size - 0.5 - np.arange(size - shore)[:, None]
    shift = size * (0.003 + 0.05 * depth) * view.ripples[0][shore:]
    mirror = blur(displaced(density[:, :shore], rows, shift), 0.008 * size)
    water = _density(sky_colour(view, np.array([[0.25 * view.horizon]], np.float32)))
    dry = step(1.2, 1.7, view.ripples[0][shore:] + 0.5 * view.ripples[1][shore:]) * (depth > 0.02)
    density[:, shore:] = mix(mirror, water, 0.18 + 0.5 * depth) * (1 - 0.55 * dry)


def paint_ink(view: View) -> Array:
    """(3, size, size): outlines of a loaded brush, a grey wash on the shadow side, and a red sun."""
    size, night = view.size, view.scene.time == "night"
    paper = _Paper(view)
    y, x = grid(size)
    above, below = {"noon": (0.04, 0.0), "dawn": (0.0, 0.26), "sunset": (0.26, 0.0), "night": (0.62, 0.16)}[
        view.scene.time
    ]
    wash = above + (below - above) * np.clip(y / view.horizon, 0, 1) ** 1.5
    ink = wash * np.ones((1, size), np.float32)
    if view.scene.clouds:
        cloud = blur(view.clouds[0], 0.01 * size)
        ink = mix(
            ink,
            0.02 + 0.3 * (step(0.1, 0.3, cloud) - step(0.3, 0.5, cloud)) + 0.25 * wash,
            step(0.08, 0.3, cloud),
        )
    distance = np.hypot(x - view.disc[0], y - view.disc[1])
    disc = np.clip((1.25 * view.disc[2] - distance) * size / 2 + 0.5, 0, 1) * view.scene.disc
    ink = ink * (1 - disc)
    for layer in view.behind:
        disc = _brush(view, paper, ink, disc, layer)
    if view.water:
        disc = _ink_lake(view, ink, disc)
    for layer in view.before:
        disc = _brush(view, paper, ink, disc, layer)
    ink = np.clip(ink * (1 + 0.10 * paper.blooms), 0, 1)
    drawn = mix(colour(RICE_PAPER), colour((0.07, 0.08, 0.11)), ink)
    seal = RICE_PAPER if night else (0.80, 0.20, 0.14)
    return np.clip(mix(drawn, drawn * colour(seal) / RICE_PAPER[0], disc), 0, 1).astype(np.float32)


def _brush(view: View, paper: _Paper, ink: Array, disc: Array, layer: Layer) -> Array:
    """Draw one layer, in place; returns what is left of the sun."""
    alpha = layer.alpha
    near = 1 - layer.distance
    light = blur(layer.light, 0.007 * view.size)
    bright = 0.8 if layer.name in ("snowy", "sand", "wall") else 0.0
    body = {"forest": 0.55, "tree": 0.85, "roof": 0.7, "window": 0.9, "green": 0.22, "red desert": 0.2}
    tone = body.get(layer.name, 0.08) * (0.35 + 0.65 * near)
    dark = 0.45 * step(0.75, 0.25, light) + 0.55 * step(0.42, 0.30, light)  # two washes, one over the other
    if layer.name == "forest":
        dark = 0.0  # one black mass
    shadow = dark * (1 - 0.35 * bright) * (0.16 + 0.30 * near)
    width = 0.010 * view.size * (0.5 + 0.7 * near)
    line = step(0.90, 0.66, blur(alpha, width)) * step(0.35, 0.6, alpha) * (0.45 + 0.5 * near)
    if view.scene.time == "night":
        tone, line = tone + 0.22 * (1 - bright), line * 0.8
    drawn = np.maximum(np.maximum(tone, tone + shadow), line)
    drawn = drawn * (1 - 0.8 * haze_share(view, layer))
    part = ink[layer.rows]
    part += (np.clip(drawn, 0, 1) - part) * alpha
    left = disc.copy()
    left[layer.rows] *= 1 - alpha
    return left


def _ink_lake(view: View, ink: Array, disc: Array) -> Array:
    size, shore = view.size, round(view.horizon * view.size)
    y = grid(size)[0][shore:]
    depth = np.maximum(y - view.horizon, 0)
    rows = (2 * view.horizon - y) * size - 0.5 - np.arange(size - shore)[:, None]
    shift = size * (0.004 + 0.07 * depth) * view.ripples[0][shore:]
    strokes = step(0.4, 0.9, view.ripples[0][shore:])
    mirror = blur(displaced(ink[:shore], rows, shift), 0.006 * size)
    ink[shore:] = 0.05 + 0.62 * mirror * (1 - 0.7 * strokes)
    left = disc.copy()
    left[shore:] = 0
    return left
