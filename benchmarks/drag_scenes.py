"""Drags whose true answers the renderer draws: a sun, a moon or a cabin elsewhere, a peak aside or higher.

Every part of a scene has a random stream of its own, so that what is moved leaves all else as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
from PIL import Image

from lorakit.pictures.warping import Point, capsule
from miniature import terrain
from miniature.landscapes import PAINTERS, Scene, held_out, lay_out
from miniature.terrain import Layer
from miniature.view import View

STYLE, SIZE = "a photo", 128
SCENE_SEED = 7_200_000  # far from the tables of all trainings
MARGIN = {"disc": 9.0, "house": 9.0, "peak": 18.0}
"""Pixels of the mask about what is moved."""


@dataclass(frozen=True)
class Case:
    """A drag of one handle by `way`, in pixels: the picture, the truth, and the mask about the way."""

    name: str
    what: str
    prompt: str
    before: Image.Image
    truth: Image.Image
    way: tuple[Point, Point]
    radius: float

    @property
    def mask(self) -> np.ndarray:
        return capsule((SIZE, SIZE), [self.way], self.radius + MARGIN[self.what])

    @property
    def kind(self) -> str:
        return "stretch" if self.what == "peak" else "move"


def draw_cases() -> list[Case]:
    """Seven drags: three discs, two houses, two peaks."""
    plain = {"trees": False, "clouds": False, "house": False, "disc": False}
    lone = plain | {"layers": "single", "foreground": "a meadow", "time": "noon"}
    return [
        _disc("moon", {**plain, "disc": True, "time": "night"}, 0, 36),
        _disc("sun at sunset", {**plain, "disc": True, "time": "sunset"}, 100, 34),
        _disc("sun at noon", {**plain, "disc": True, "time": "noon"}, 200, 26),
        _house("house", {**plain, "house": True, "foreground": "a meadow"}, 300, 24),
        _house("house on sand", {**plain, "house": True, "foreground": "sand dunes"}, 400, 24),
        _peak("peak aside", {**lone, "mountain": "snowy"}, 500, 16, 0),
        _peak("peak up", {**lone, "mountain": "rocky", "time": "sunset"}, 600, 0, -16),
    ]


def _scenes(first: int, given: dict) -> Iterator[Scene]:
    seed = SCENE_SEED + first
    while True:
        scene = Scene.sample(seed, **given)
        if not held_out(STYLE, scene):
            yield scene
        seed += 1


def _painted(view: View) -> Image.Image:
    levels = np.rint(255 * np.clip(PAINTERS[STYLE](view), 0, 1)).astype(np.uint8)
    whole = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    return whole.resize((SIZE, SIZE), Image.Resampling.BOX)


def _case(name: str, what: str, scene: Scene, views: tuple[View, View], way, radius: float) -> Case:
    before, truth = map(_painted, views)
    return Case(name, what, scene.caption(STYLE, details=True), before, truth, way, radius)


def _disc(name: str, given: dict, first: int, length: float) -> Case:
    """Sun or moon with its glow, to the side where there is sky."""
    for scene in _scenes(first, given):
        view = lay_out(scene, 2 * SIZE)
        x, y, radius = view.disc
        step = length / SIZE * (1 if x < 0.5 else -1)
        other = replace(view, disc=(x + step, y, radius))
        if _is_sky(view, x, y, radius) and _is_sky(view, x + step, y, radius):
            way = ((x * SIZE, y * SIZE), ((x + step) * SIZE, y * SIZE))
            return _case(name, "disc", scene, (view, other), way, radius * SIZE)
    raise AssertionError


def _is_sky(view: View, x: float, y: float, radius: float) -> bool:
    """Whether nothing stands before a disc and its rim."""
    reach, low = 1.4 * radius * view.size, (y + 1.4 * radius) * view.size
    columns = np.s_[max(int(x * view.size - reach), 0) : int(x * view.size + reach) + 1]
    for layer in view.behind:
        rows = max(int(low) - layer.top, 0)
        if layer.alpha[:rows, columns].any():
            return False
    return True


def _house(name: str, given: dict, first: int, length: int) -> Case:
    """A cabin rolled to the side."""
    parts = ("wall", "roof", "window")
    for scene in _scenes(first, given):
        view = lay_out(scene, 2 * SIZE)
        places = [place for layer in view.before if layer.name in parts for place in _covered(layer)]
        rows, columns = np.array(places).T
        (top, bottom), (left, right) = ((v.min(), v.max()) for v in (rows, columns))
        step = 2 * length if left < view.size - right else -2 * length
        if min(left + step, view.size - 1 - right - step) < 8 or bottom > view.size - 8:
            continue
        moved = [
            replace(layer, alpha=np.roll(layer.alpha, step, axis=1)) if layer.name in parts else layer
            for layer in view.before
        ]
        x, y = (left + right) / 4, (top + bottom) / 4
        radius = max(right - left, bottom - top) / 4
        way = ((float(x), float(y)), (float(x + step / 2), float(y)))
        return _case(name, "house", scene, (view, replace(view, before=moved)), way, radius)
    raise AssertionError


def _covered(layer: Layer) -> np.ndarray:
    return np.argwhere(layer.alpha > 0.5) + (layer.top, 0)


def _peak(name: str, given: dict, first: int, aside: float, up: float) -> Case:
    """The highest peak of a lone mountain, with all that hangs on it."""
    peaks = terrain._peaks

    def patched(rng, height, lone):
        found = peaks(rng, height, lone)
        if lone:
            u, v, high = found[0]
            found[0] = (u + aside / SIZE, v, high - up / SIZE)
        return found

    for scene in _scenes(first, given):
        view = lay_out(scene, 2 * SIZE)
        with mock.patch.object(terrain, "_peaks", patched):
            other = lay_out(scene, 2 * SIZE)
        ends = [_apex(each) for each in (view, other)]
        (x0, y0), (x1, y1) = ends
        length = np.hypot(x1 - x0, y1 - y0)
        if abs(length - abs(aside + up)) < 4 and min(y0, y1) > 12 and 24 < x0 < 104:
            return _case(name, "peak", scene, (view, other), (ends[0], ends[1]), 8.0)
    raise AssertionError


def _apex(view: View) -> Point:
    """The highest place of the mountain that stands in front, just below its edge."""
    layer = view.behind[1]
    rows, columns = _covered(layer).T
    top = rows.min()
    return float(columns[rows == top].mean()) / 2, float(top) / 2 + 2
