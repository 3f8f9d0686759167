"""What lies in front of the mountains: shores, woods, meadows, dunes, trees and a cabin, as layers."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from lorakit.ground.randomness import uniform
from miniature.fields import Array, fractal_noise, grid, step, stream, value_noise
from miniature.scene import Scene
from miniature.terrain import Layer, trimmed


def foreground(scene: Scene, size: int, horizon: float, side: int) -> tuple[list[Layer], list[Layer]]:
    """Layers behind the waterline, which a lake mirrors, and layers before it; see terrain.ranges."""
    makers = {"a lake": _shore, "a forest": _forest, "a meadow": _meadow, "sand dunes": _dunes}
    behind, before = makers[scene.foreground](scene, size, horizon, side)
    if scene.house:
        house = _house(scene, size, horizon, side)
        (behind if scene.foreground == "a lake" else before).extend(house)
    if scene.trees:
        before = before + _near_trees(scene, size, side)
    return behind, before


def _flat(size: int, value: float) -> Array:
    return np.full((size, size), value, np.float32)


def _below(line: Array, size: int) -> Array:
    """Coverage of all that lies under a skyline (W,) given in heights of the picture from the top."""
    return np.clip((grid(size)[0] - line) * size + 0.5, 0, 1).astype(np.float32)


def _curve(rng: np.random.Generator, size: int, cells: int, octaves: int) -> Array:
    """A smooth random line (W,), mean 0, variance near 1."""
    return fractal_noise(rng, (4, size), (1, cells), octaves)[0]


# ---- the four foregrounds ----


def _shore(scene: Scene, size: int, horizon: float, side: int) -> tuple[list[Layer], list[Layer]]:
    waterline = round(horizon * size)
    far_wood = _tree_row(scene, size, "shore", horizon + 0.004, 0.026, side, 0.5)
    rng = stream(scene.seed, "bank")
    y, x = grid(size)
    reach = x if _trees_stand_left(scene) else 1 - x
    line = 0.865 + rng.uniform(0.0, 0.03) + 0.26 * (reach - 0.12) + 0.012 * _curve(rng, size, 5, 3)
    grain = fractal_noise(rng, (size, size), (20, 10), 3)
    light = np.clip(0.75 + 0.15 * grain - 1.2 * (y - line), 0, 1)
    bank = trimmed("meadow", _below(line, size), light, _flat(size, 0.25), grain, 0.0)
    if scene.mountain == "red desert":
        strip = _below(_flat(size, horizon - 0.008)[0], size)
        beach = trimmed("sand", strip, _flat(size, 0.8), _flat(size, 0), grain, 0.4, waterline)
        return [beach], [replace(bank, name="sand")]
    return [far_wood], [bank]


def _forest(scene: Scene, size: int, horizon: float, side: int) -> tuple[list[Layer], list[Layer]]:
    rows = []
    for k, distance in enumerate((0.45, 0.25, 0.1, 0.0)):
        near = k / 3
        base = horizon + 0.03 + 0.33 * near**1.3
        rows.append(_tree_row(scene, size, f"forest/{k}", base, 0.055 + 0.12 * near, side, distance))
    return [], rows


def _tree_row(
    scene: Scene, size: int, name: str, base: float, height: float, side: int, distance: float
) -> Layer:
    """A stand of conifers as one mass: at each column the tallest tree there, lit from its side."""
    rng = stream(scene.seed, f"trees/{name}")
    y, x = grid(size)
    count = int(2.2 / height)
    centre = (np.arange(count) + rng.uniform(-0.4, 0.4, count)) / (count - 1)
    tall = height * rng.uniform(0.55, 1.1, count)
    wide = tall * rng.uniform(0.22, 0.32, count)
    offset = (x - centre[:, None]) / wide[:, None]  # (trees, W), -1 to 1 inside
    rise = 1 - np.abs(offset)
    rise = rise + 0.9 * np.sin(2 * np.pi * 4 * rise) / (2 * np.pi * 4)  # tiers of branches
    tops = np.where(np.abs(offset) < 1, tall[:, None] * rise, -1)
    tallest = tops.argmax(axis=0)
    columns = np.arange(size)
    ground = base + 0.02 * _curve(rng, size, 3, 2)
    line = ground - np.maximum(tops[tallest, columns], 0)
    tone = rng.uniform(-0.25, 0.25, count)[tallest]
    lit = 0.5 + 0.35 * side * offset[tallest, columns] + tone
    fade = step(0.75 * height, 0.0, y - line)
    light = np.clip(0.12 + 0.05 * (y - line) / height + (lit - 0.12) * fade, 0, 1).astype(np.float32)
    grain = value_noise(rng, (size, size), (48, 48))
    return trimmed("forest", _below(line, size), light, np.clip(light, 0, 1), grain, distance)


def _meadow(scene: Scene, size: int, horizon: float, side: int) -> tuple[list[Layer], list[Layer]]:
    hills = []
    y, x = grid(size)
    for k, (lift, distance) in enumerate(((0.0, 0.4), (0.055, 0.2), (0.15, 0.0))):
        rng = stream(scene.seed, f"meadow/{k}")
        slope = rng.uniform(-0.05, 0.05)
        line = horizon + lift + (0.008 + 0.014 * k) * _curve(rng, size, 3, 2) + slope * (x[0] - 0.5)
        grain = fractal_noise(rng, (size, size), (28 - 8 * k, 7), 3)
        waves = value_noise(rng, (size, size), (9, 3))
        light = np.clip(0.70 + 0.16 * waves - 0.5 * (y - line) * (k == 2), 0, 1)
        patches = step(-0.8, 2.4, fractal_noise(rng, (size, size), (11, 3), 2))
        accent = np.clip(0.6 * patches, 0, 1)
        hills.append(trimmed("meadow", _below(line, size), light, accent, grain, distance))
    return [], hills


def _dunes(scene: Scene, size: int, horizon: float, side: int) -> tuple[list[Layer], list[Layer]]:
    """Each dune has a crest that winds forward; the slope away from the light lies in shadow."""
    layers = []
    y, x = grid(size)
    for k, (lift, height, distance) in enumerate(((0.0, 0.03, 0.35), (0.07, 0.06, 0.15), (0.19, 0.09, 0.0))):
        rng = stream(scene.seed, f"dunes/{k}")
        count = 3 - k if k else 4
        phase = rng.uniform() + count * x[0] + 0.12 * _curve(rng, size, 3, 2)
        saw = phase - np.floor(phase)
        saw = saw if side > 0 else 1 - saw
        crest = np.where(saw < 0.68, saw / 0.68, (1 - saw) / 0.32)  # long windward slope, short lee
        line = horizon + lift + 0.01 * _curve(rng, size, 3, 2) - height * (step(0, 1, crest) - 0.4)
        depth = np.maximum(y - line, 0)
        bend = (
            saw
            + 0.9 * depth * (1 + 0.5 * np.sin(9 * depth + k))
            + 0.02 * value_noise(rng, (size, size), (6, 4))
        )
        lee = step(0.665, 0.685, bend) * step(1.02, 0.72, bend) * np.exp(-depth / (1.6 * height))
        ripple = value_noise(rng, (size, size), (40, 6))
        light = np.clip(0.92 - 0.75 * lee - 0.5 * depth + 0.04 * ripple, 0, 1).astype(np.float32)
        layers.append(trimmed("sand", _below(line, size), light, _flat(size, 0), 0.5 * ripple, distance))
    return [], layers


# ---- trees and a cabin ----


def _trees_stand_left(scene: Scene) -> bool:
    """The side of the picture that near trees, and the bank of a lake, rise on."""
    return uniform(scene.seed, "landscape/trees-side") < 0.5


def _near_trees(scene: Scene, size: int, side: int) -> list[Layer]:
    """Two to four large trees that frame the picture on one side."""
    rng = stream(scene.seed, "near-trees")
    left, count = _trees_stand_left(scene), int(rng.integers(2, 5))
    alpha, light = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    for k in range(count):
        x = (0.05 + 0.3 * (k + rng.uniform(0.1, 0.7)) / count) * (1 if left else -1) + (0 if left else 1)
        height = rng.uniform(0.34, 0.5) * (1 - 0.35 * k / count)
        place = (x, rng.uniform(0.9, 1.02) - 0.05 * k / count, height)
        draw = _conifer if scene.foreground in ("a lake", "a forest") else _broadleaf
        own, lit = draw(rng, size, place, side)
        alpha, light = np.maximum(alpha, own), np.where(own > 0.5, lit, light)
    grain = value_noise(rng, (size, size), (40, 40))
    return [trimmed("tree", alpha, light, light, grain, 0.0)]


def _conifer(
    rng: np.random.Generator, size: int, place: tuple[float, float, float], side: int
) -> tuple[Array, Array]:
    """Coverage and light of one conifer; place is (x, y of its foot, height)."""
    x0, foot, height = place
    y, x = grid(size)
    z = (foot - y) / height  # 0 at the foot, 1 at the tip
    tiers = 6 + int(rng.integers(0, 3))
    saw = np.mod(z * tiers, 1)
    half = height * 0.26 * (1 - z) * (1.12 - 0.42 * saw) * (z > 0.1) + 0.012 * height * ((z <= 0.1) & (z > 0))
    half = np.where(z < 1, half, 0)
    alpha = np.clip((half - np.abs(x - x0)) * size + 0.5, 0, 1) * (half > 0)
    lit = 0.42 + 0.45 * side * (x - x0) / np.maximum(half, 1e-3) + 0.25 * (0.5 - saw)
    return alpha.astype(np.float32), np.clip(lit, 0, 1).astype(np.float32)


def _broadleaf(
    rng: np.random.Generator, size: int, place: tuple[float, float, float], side: int
) -> tuple[Array, Array]:
    """Coverage and light of a trunk under a round crown."""
    x0, foot, height = place
    y, x = grid(size)
    trunk = (
        (np.abs(x - x0) < 0.022 * height * (1.6 - (foot - y) / height))
        & (y < foot)
        & (y > foot - 0.6 * height)
    )
    alpha, lit = trunk.astype(np.float32), np.full((size, size), 0.12, np.float32)
    clumps = fractal_noise(rng, (size, size), (18, 18), 2)
    dx, dy = (x - x0) / (0.3 * height), (y - foot + 0.68 * height) / (0.31 * height)
    reach = np.sqrt(dx * dx + dy * dy) * (1 + 0.11 * clumps)
    crown = np.clip((1 - reach) * 0.3 * height * size + 0.5, 0, 1)
    shade = np.clip(0.42 + 0.3 * side * dx - 0.34 * dy + 0.12 * clumps, 0, 1)
    lit = np.where(crown > 0.5, shade, lit)
    alpha = np.maximum(alpha, crown)
    return alpha.astype(np.float32), lit.astype(np.float32)


def _house(scene: Scene, size: int, horizon: float, side: int) -> list[Layer]:
    """A cabin with a gable towards the viewer and its long side in perspective."""
    rng = stream(scene.seed, "house")
    width, turn = rng.uniform(0.075, 0.1), 1 if rng.uniform() < 0.5 else -1
    x0 = rng.uniform(0.46, 0.74)
    x0 = x0 if _trees_stand_left(scene) else 1 - x0  # where near trees do not hide it
    foot = horizon + {"a lake": 0.012, "a forest": 0.17, "a meadow": 0.1, "sand dunes": 0.1}[scene.foreground]
    wall, rise, length = 0.62 * width, 0.55 * width, 1.25 * width * turn
    left, right = x0 - width / 2, x0 + width / 2
    near, far = (right, left) if turn > 0 else (left, right)
    eaves, top = foot - wall, foot - wall - rise
    back = 0.10 * width
    gable = [(left, foot), (left, eaves), (x0, top), (right, eaves), (right, foot)]
    flank = [(near, foot), (near, eaves), (near + length, eaves - back * 0.3), (near + length, foot - back)]
    over = 0.14 * width * turn
    roof = [(x0, top), (near + over, eaves + 0.1 * width), (near + length + over, eaves - back * 0.2)]
    roof += [(x0 + length, top - back * 0.5)]
    edge = [(x0, top), (far - over, eaves + 0.1 * width), (far - 1.6 * over, eaves + 0.1 * width)]
    edge += [(x0, top - 0.1 * width)]
    w = 0.15 * width
    pane = [(x0 - w, foot - 0.5 * wall), (x0 + w, foot - 0.5 * wall), (x0 + w, eaves), (x0 - w, eaves)]
    mid = near + 0.5 * length
    pane2 = [(mid - w, foot - 0.45 * wall), (mid + w, foot - 0.45 * wall)]
    pane2 += [(mid + w, foot - 0.8 * wall), (mid - w, foot - 0.8 * wall)]
    lit_flank = 0.95 if turn == side else 0.35
    parts = [
        ("wall", flank, lit_flank),
        ("wall", gable, 0.75),
        ("roof", roof, lit_flank),
        ("roof", edge, 0.6),
    ]
    parts += [("window", pane, 0.5), ("window", pane2, 0.5)]
    return [_part(name, polygon, light, size) for name, polygon, light in parts]


def _part(name: str, polygon: list[tuple[float, float]], light: float, size: int) -> Layer:
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon([(x * size, y * size) for x, y in polygon], fill=255)
    alpha = np.asarray(mask, np.float32) / 255
    return trimmed(name, alpha, _flat(size, light), _flat(size, 0), _flat(size, 0), 0.12)
