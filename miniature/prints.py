"""Styles of flat colour: a screen-printed poster, pixel art, and a window of stained glass."""

import numpy as np
from PIL import Image, ImageFilter

from miniature.fields import Array, blur, colour, displaced, grid, mix, step, stream
from miniature.palette import HOURS, lit_colour, put, sky_colour
from miniature.terrain import Layer
from miniature.view import View

PIXELS, COLOURS = 32, 14  # of pixel art


def paint_poster(view: View) -> Array:
    """(3, size, size): rings of sky around the sun, two tones to each thing, no texture."""
    canvas = _rings(view)
    for layer in view.behind:
        put(canvas, layer, _two_tones(view, layer))
    if view.water:
        _print_lake(view, canvas)
    for layer in view.before:
        put(canvas, layer, _two_tones(view, layer))
    return np.clip(canvas, 0, 1)


def saturated(picture: Array, amount: float) -> Array:
    """Colours moved away from their grey."""
    grey = (picture * colour((0.3, 0.59, 0.11))).sum(axis=0, keepdims=True)
    return grey + amount * (picture - grey)


def tones(field: Array, radius: float) -> Array:
    """A field cut into two tones along a smooth line."""
    return step(0.40, 0.47, blur(field, radius))


def _rings(view: View) -> Array:
    hour = HOURS[view.scene.time]
    y, x = grid(view.size)
    cx, cy, radius = view.disc
    if not view.scene.disc:
        cy = view.horizon  # the rings rise from below it, and no one takes their centre for a sun
    # Rings that widen outwards, the innermost in the colour of the horizon and the outermost in the zenith's.
    distance = np.hypot(x - cx, 0.9 * (y - cy)) / 0.85
    ring = 6 * np.sqrt(distance)
    whole = np.floor(ring)
    level = (whole + step(0.97, 1.0, ring - whole)) / 6
    canvas = sky_colour(view, (view.horizon * (1 - np.clip(level, 0, 1))).reshape(-1, 1))
    canvas = saturated(canvas.reshape(3, view.size, view.size), 1.15)
    if view.scene.time == "night":
        canvas = mix(canvas, colour(hour.disc), step(0.35, 0.5, view.stars))
    if view.scene.disc:
        canvas = mix(
            canvas, colour(hour.disc), np.clip((1.2 * radius - np.hypot(x - cx, y - cy)) * view.size, 0, 1)
        )
    if view.scene.clouds:
        lit, dark = (colour(values) for values in hour.cloud)
        cloud = blur(view.clouds[0], view.size / 128)
        canvas = mix(canvas, mix(dark, lit, 0.45), step(0.30, 0.36, cloud))
        canvas = mix(canvas, lit, step(0.62, 0.68, cloud))
    return canvas.astype(np.float32)


def _two_tones(view: View, layer: Layer) -> Array:
    radius = 0.012 * view.size * (1 - 0.4 * layer.distance)
    if layer.name in ("wall", "roof", "window"):
        light, accent = layer.light, layer.accent
    elif layer.name == "forest":
        light, accent = 0.15 + 0.3 * tones(layer.light, radius / 2), 0.5 * np.ones_like(layer.accent)
    else:
        light = 0.30 + 0.55 * tones(layer.light, radius)
        accent = tones(layer.accent, 0.7 * radius)
    painted = saturated(lit_colour(view, layer, light, accent), 1.25)
    haze = saturated(colour(HOURS[view.scene.time].haze), 1.25)
    return mix(painted, haze, 0.70 * layer.distance)


def _print_lake(view: View, canvas: Array) -> None:
    """A mirror cut into strips, each shifted a little, and streaks of light."""
    size, shore = view.size, round(view.horizon * view.size)
    y = grid(size)[0][shore:]
    depth = np.maximum(y - view.horizon, 0)
    shift = np.round(2 * view.ripples[0][shore:, :1]) * (0.004 + 0.05 * depth) * size
    rows = (2 * view.horizon - y) * size - 0.5 - np.arange(size - shore)[:, None]
    mirror = displaced(canvas[:, :shore], rows, shift * np.ones((1, size)))
    water = saturated(sky_colour(view, np.array([[0.3 * view.horizon]], np.float32)), 1.2)
    streaks = step(1.1, 1.25, view.ripples[0][shore:] + 0.4 * view.ripples[1][shore:]) * (depth > 0.015)
    canvas[:, shore:] = mix(
        mix(mirror, water, 0.42), water * 0.4 + 0.6 * canvas[:, shore - 1 : shore], 0.6 * streaks
    )


def paint_pixel_art(view: View) -> Array:
    """(3, size, size): the poster in 32x32 squares of 14 colours."""
    poster = Image.fromarray((255 * paint_poster(view)).astype(np.uint8).transpose(1, 2, 0).copy())
    small = poster.resize((PIXELS, PIXELS), Image.Resampling.BOX)
    few = small.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    large = few.resize((view.size, view.size), Image.Resampling.NEAREST)
    return np.asarray(large, np.float32).transpose(2, 0, 1) / 255


def paint_stained_glass(view: View) -> Array:
    """(3, size, size): panes that follow the things, each of one glowing colour, in dark lead."""
    panes = 64 * _shown(view) + _cells(view)
    names, pane = np.unique(panes, return_inverse=True)
    pane = pane.reshape(panes.shape)
    poster = saturated(paint_poster(view), 1.55)
    counts = np.bincount(pane.ravel())
    means = np.stack([np.bincount(pane.ravel(), plane.ravel()) / counts for plane in poster])
    glow = 1 + 0.22 * stream(view.scene.seed, "glass").uniform(-1, 1, len(names))
    y, x = grid(view.size)
    glass = 0.06 + 0.98 * (means * glow).astype(np.float32)[:, pane]
    border = (np.diff(pane, axis=0, append=pane[-1:]) != 0) | (
        np.diff(pane, axis=1, append=pane[:, -1:]) != 0
    )
    lines = Image.fromarray((255 * border).astype(np.uint8)).filter(
        ImageFilter.MaxFilter(1 + 2 * (view.size // 128))
    )
    lead = blur(np.asarray(lines, np.float32) / 255, 1)
    return np.clip(mix(glass, colour((0.05, 0.05, 0.07)), 0.95 * lead), 0, 1)


def _shown(view: View) -> Array:
    """The number of the thing that each pixel shows; sun, sky, water and layers count apart."""
    size = view.size
    y, x = grid(size)
    shown = np.zeros((size, size), np.int64)
    if view.scene.disc:
        shown[np.hypot(x - view.disc[0], y - view.disc[1]) < 1.3 * view.disc[2]] = 1
    if view.scene.clouds:
        shown[blur(view.clouds[0], size / 64) > 0.4] = 2
    for number, layer in enumerate(view.behind):  # distant ranges share panes, which would be slivers else
        shown[layer.rows][layer.alpha > 0.5] = 3 + (number if layer.distance < 0.7 else 0)
    if view.water:
        shown[round(view.horizon * size) :] = 3 + len(view.behind)
    for number, layer in enumerate(view.before):
        pane = number // 2 if layer.name == "forest" else number
        shown[layer.rows][layer.alpha > 0.5] = 4 + len(view.behind) + pane
    return shown


def _cells(view: View, count: int = 7) -> Array:
    """The nearest of count x count scattered points for each pixel: a mosaic (Worley 1996)."""
    y, x = grid(view.size)
    places = stream(view.scene.seed, "panes").uniform(0.1, 0.9, (2, count, count)).astype(np.float32)
    py, px = (np.arange(count)[:, None] + places[0]) / count, (np.arange(count) + places[1]) / count
    nearest = np.full((view.size, view.size), np.inf, np.float32)
    cell = np.zeros((view.size, view.size), np.int64)
    for below, beside in np.ndindex(3, 3):  # the nearest point lies in a pixel's own square or one around it
        rows = np.clip((y * count).astype(np.int64) + below - 1, 0, count - 1)
        columns = np.clip((x * count).astype(np.int64) + beside - 1, 0, count - 1)
        number = rows * count + columns
        d2 = (y - py.take(number)) ** 2 + (x - px.take(number)) ** 2
        cell = np.where(d2 < nearest, number, cell)
        nearest = np.minimum(d2, nearest)
    return cell
