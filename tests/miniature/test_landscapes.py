"""The renderer of the miniature: the same seed draws the same scene, and every attribute shows."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.ground.errors import UserError
from miniature import draw_style
from miniature.landscapes import (
    BASE_STYLES,
    FOREGROUNDS,
    HELD_OUT_STYLES,
    LAYERS,
    MOUNTAINS,
    STYLES,
    TIMES,
    Scene,
    held_out,
    lay_out,
    parse_caption,
    render,
)

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(4)


def array(scene: Scene, style: str = "a photo", size: int = 64) -> np.ndarray:
    return np.asarray(render(scene, style, size), np.float32) / 255


def edge_density(picture: np.ndarray) -> float:
    """Share of pixels with a brightness step of more than a tenth to the next pixel."""
    grey = picture.mean(axis=2)
    steps = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    return float((steps > 0.1).mean())


def ridge_masks(scene: Scene, size: int = 128) -> list[np.ndarray]:
    """Where each range of mountains is, down to the highest waterline."""
    masks = []
    for layer in lay_out(scene, size).behind:
        if layer.name == scene.mountain:
            mask = np.zeros((size, size), np.float32)
            mask[layer.rows] = layer.alpha
            masks.append(mask[: int(0.6 * size)])
    return masks


@pytest.mark.parametrize("style", STYLES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_picture(style):
    for seed in SEEDS:
        scene = Scene.sample(seed)
        assert render(scene, style, 64).tobytes() == render(replace(scene), style, 64).tobytes()
        other = Scene.sample(seed + 100, **{a: getattr(scene, a) for a in ("time", "mountain", "foreground")})
        assert np.abs(array(scene, style) - array(other, style)).mean() > 0.01


def test_ridges_do_not_move_with_anything_but_their_own_attributes():
    changes = {"time": TIMES, "foreground": FOREGROUNDS}
    flags = dict.fromkeys(("disc", "clouds", "trees", "house"), (False, True))
    for seed in SEEDS:
        scene = Scene.sample(seed)
        masks = ridge_masks(scene)
        assert len(masks) == {"single": 2, "range": 2, "distant ranges": 4}[scene.layers]
        for name, values in (changes | flags).items():
            for value in values:
                other = ridge_masks(replace(scene, **{name: value}))
                for mask, moved in zip(masks, other, strict=True):
                    np.testing.assert_array_equal(mask, moved)
        assert any(
            not np.array_equal(mask, moved)
            for mask, moved in zip(masks, ridge_masks(replace(scene, seed=seed + 1)), strict=True)
        )


def test_styles_paint_the_same_geometry():
    """Sky and mountains of one scene part along the same line in a photograph and in a poster."""
    scene = Scene(seed=5, time="noon", mountain="rocky", layers="single", foreground="sand dunes")
    ridge = np.max(ridge_masks(scene, 256), axis=0)  # drawn at twice the picture's size
    top = 256 - np.count_nonzero(np.vstack([ridge, np.ones((256 - len(ridge), 256))]) > 0.5, axis=0)
    for style in ("a photo", "a flat poster"):
        picture = array(scene, style, 128)
        blue = picture[..., 2] - picture[..., 0]
        rows = (top[::2] // 2).astype(int)
        above, below = blue[rows - 4, np.arange(128)], blue[rows + 3, np.arange(128)]
        assert (above > below).mean() > 0.9, style


def test_larger_pictures_show_the_same_scene():
    for seed, style in product(SEEDS, ("a photo", "a flat poster")):
        small, large = array(Scene.sample(seed), style, 64), array(Scene.sample(seed), style, 128)
        halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(small - halved).mean() < 0.03


def test_captions_name_the_attributes_and_are_read_back():
    scenes = [Scene.sample(seed) for seed in range(200)]
    assert {scene.layers for scene in scenes} == set(LAYERS)
    for scene, style in product(scenes, STYLES):
        found, given = parse_caption(scene.caption(style, details=True))
        assert found == style and Scene(seed=scene.seed, **given) == scene
        found, given = parse_caption(scene.caption(style))
        assert found == style and not any(given[flag] for flag in ("disc", "clouds", "trees", "house"))
    scene = Scene(seed=0, time="sunset", mountain="snowy", foreground="a lake", layers="distant ranges")
    assert scene.caption("a watercolor") == (
        "a watercolor of distant ranges of snowy mountains at sunset with a lake"
    )
    full = replace(scene, time="night", disc=True, clouds=True, trees=True, house=True)
    assert full.caption("a photo", details=True).endswith("with a lake, the moon, clouds, trees, a house")
    with pytest.raises(ValueError, match="not the caption"):
        parse_caption("a photo of a cat")


def test_unknown_values_are_refused_by_name():
    with pytest.raises(ValueError, match="time must be one of dawn"):
        Scene(seed=0, time="evening")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="style must be one of a photo"):
        render(Scene(seed=0), "a fresco")
    with pytest.raises(ValueError, match="multiple of 32"):
        render(Scene(seed=0), "a photo", 100)


def test_one_combination_in_twelve_is_held_out_and_every_pair_stays_known():
    combinations = list(product(BASE_STYLES, TIMES, MOUNTAINS, FOREGROUNDS))
    kept = {
        combination
        for combination in combinations
        if not held_out(
            combination[0],
            Scene(seed=0, time=combination[1], mountain=combination[2], foreground=combination[3]),
        )
    }
    assert len(combinations) == 192 and len(kept) == 192 - 16
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        pairs = {(combination[first], combination[second]) for combination in combinations}
        assert {(combination[first], combination[second]) for combination in kept} == pairs
    shares = [held_out(style, Scene.sample(seed)) for style in HELD_OUT_STYLES for seed in range(1200)]
    assert np.mean(shares) == pytest.approx(1 / 12, abs=0.02)


@pytest.mark.parametrize("style", STYLES)
def test_every_attribute_shows(style):
    plain = Scene(seed=3, time="noon", mountain="rocky", foreground="a meadow")
    before = array(plain, style)
    assert np.abs(before - array(replace(plain), style)).max() == 0  # the control
    changes = {
        "time": TIMES[:1] + TIMES[2:],
        "mountain": ("snowy", "green", "red desert"),
        "layers": LAYERS[::2],
    }
    changes |= {"foreground": ("a lake", "a forest", "sand dunes")}
    changes |= dict.fromkeys(("disc", "clouds", "trees", "house"), (True,))
    for name, values in changes.items():
        for value in values:
            changed = np.abs(array(replace(plain, **{name: value}), style) - before).max(axis=2)
            assert (changed > 0.06).mean() > 0.002, (name, value)
            assert changed.mean() > 0.0015, (name, value)


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_neither_blank_nor_noise(style):
    densities = []
    for seed in range(12):
        picture = array(Scene.sample(seed), style, 128)
        assert picture.std() > 0.03 and 0.05 < picture.mean() < 0.95
        densities.append(edge_density(picture))
    limit = {"a stained glass window": 0.5, "an ink drawing": 0.2, "pixel art": 0.15}.get(style, 0.11)
    assert 0.002 < np.mean(densities) < limit


def test_a_photo_has_no_more_edges_than_twice_a_posters():
    mean = {
        style: np.mean([edge_density(array(Scene.sample(seed), style, 128)) for seed in range(12)])
        for style in ("a photo", "a flat poster")
    }
    assert mean["a photo"] < 2 * mean["a flat poster"]


def test_a_lake_mirrors_what_stands_above_it():
    scene = Scene(seed=2, time="sunset", mountain="snowy", foreground="a lake", layers="single")
    picture = array(scene, "a photo", 128)
    shore = round(lay_out(scene, 256).horizon * 128)
    above, below = picture[shore - 24 : shore - 2][::-1], picture[shore + 2 : shore + 24]
    assert np.corrcoef(above.ravel(), below.ravel())[0, 1] > 0.75


def seconds_of(work: Callable[[], object]) -> float:
    """Of one core."""
    start = time.process_time()
    work()
    return time.process_time() - start


def test_a_picture_costs_some_transforms_of_its_canvas():
    """Measured: 35 to 65 ms for 128 pixels on one core of an EPYC, as much as 11 to 15 transforms."""
    canvas = np.random.default_rng(0).random((3, 256, 256))
    transform = min(seconds_of(lambda: np.fft.fft2(canvas)) for _ in range(9))
    drawn = [(Scene.sample(seed), style) for seed, style in product(range(4), BASE_STYLES)]
    assert seconds_of(lambda: [render(*each) for each in drawn]) / 12 < 60 * transform


def test_the_data_set_of_the_style_is_what_its_script_draws(tmp_path, capsys):
    folder = tmp_path / "ink"
    assert draw_style.main([f"folder={folder}", "pictures=3"]) == 0
    assert "3 pictures" in capsys.readouterr().out
    for name in ("000.png", "002.png"):
        ours, shipped = Image.open(folder / name), Image.open(ROOT / "dataset/ink" / name)
        assert np.array_equal(np.asarray(ours), np.asarray(shipped))
    lines = (ROOT / "dataset/ink/metadata.jsonl").read_text().splitlines()
    assert (folder / "metadata.jsonl").read_text().splitlines() == lines[:3]
    assert all('"an ink drawing of ' in line for line in lines) and len(lines) == 40
    other = tmp_path / "pixel"
    draw_style.main([f"folder={other}", "pictures=1", "style=pixel art"])
    assert not np.array_equal(
        np.asarray(Image.open(other / "000.png")), np.asarray(Image.open(folder / "000.png"))
    )
    with pytest.raises(UserError, match="holds a data set"):
        draw_style.main([f"folder={folder}"])


def test_validation_scenes_of_the_style_are_not_its_training_scenes():
    trained = {draw_style.style_scene(i, 0) for i in range(40)}
    assert not trained & {draw_style.style_scene(i, 1) for i in range(8)}
    assert draw_style.style_scene(3, 0) in trained
