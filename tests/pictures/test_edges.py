"""Canny's edges against answers known by hand, thresholds in OpenCV's units, and how alike edges are."""

import numpy as np
import pytest

from lorakit.pictures.edges import (
    OPENCV_UNIT,
    as_floats,
    auto_thresholds,
    canny,
    dilated,
    edge_f1,
    edge_image,
    hint_picture,
)


def grey(levels):
    """(H, W, 3) in [0, 1] of grey levels (H, W)."""
    return np.repeat(np.asarray(levels, np.float32)[..., None] / 255, 3, axis=2)


def step(height=16, width=16, level=50, at=8):
    """A dark left side and a right side that is lighter by `level`."""
    levels = np.full((height, width), 100.0)
    levels[:, at:] += level
    return levels


@pytest.mark.parametrize("turned", [False, True])
def test_a_step_of_50_levels_is_a_gradient_of_200_in_opencv_s_units(turned):
    """Sobel's kernel weighs the three rows 1, 2, 1: four times the step."""
    levels = step(level=50)
    picture = grey(levels.T if turned else levels)
    found = canny(picture, 0, 100 * OPENCV_UNIT, 199 * OPENCV_UNIT)
    assert not canny(picture, 0, 100 * OPENCV_UNIT, 201 * OPENCV_UNIT).any()
    found = found.T if turned else found
    assert (found.sum(axis=1) == 1).all() and found[:, 7:9].any(axis=0).sum() == 1  # one line, one pixel wide


def test_a_weak_edge_counts_where_it_is_joined_to_a_strong_one():
    levels = step(level=60)  # 240 in the upper half, 120 below
    levels[8:, 8:] -= 30
    low, high = 110 * OPENCV_UNIT, 200 * OPENCV_UNIT
    joined = canny(grey(levels), 0, low, high)[:, 7:9].any(axis=1)
    assert joined.all()
    assert not canny(grey(levels), 0, 130 * OPENCV_UNIT, high)[10:, 7:9].any()
    alone = step(level=30)
    assert not canny(grey(alone), 0, low, high).any() and canny(grey(alone), 0, low, low).any()


def test_auto_thresholds_follow_the_contrast_and_find_nothing_in_flat_pictures():
    rng = np.random.default_rng(0)
    levels = step(32, 32, 80, 12) + rng.normal(0, 2, (32, 32))
    low, high = auto_thresholds(grey(levels))
    assert low == pytest.approx(0.4 * high)
    soft = 100 + (levels - 100) / 2
    assert auto_thresholds(grey(soft))[1] == pytest.approx(high / 2, rel=1e-3)
    edges = canny(grey(levels), 1.0, low, high)
    assert (edges == canny(grey(soft), 1.0, *auto_thresholds(grey(soft)))).all()
    assert edges[:, 10:14].any(axis=1).all() and not edges[:, 18:].any()
    for flat in (np.full((32, 32), 90.0), 90 + rng.integers(0, 2, (32, 32))):
        assert not canny(grey(flat), 1.0, *auto_thresholds(grey(flat))).any()


def test_auto_thresholds_find_the_lines_of_a_drawing():
    """Where more than a tenth of the pixels is as steep as it gets."""
    levels = np.full((32, 32), 255.0)
    levels[:, 4::8] = 0
    for sigma in (0, 1.0):
        edges = canny(grey(levels), sigma, *auto_thresholds(grey(levels), sigma))
        assert 6 * 32 <= edges.sum() <= 8 * 32, sigma  # both sides of each of four lines


def test_blur_takes_fine_lines_away_and_leaves_large_steps():
    levels = step(32, 32, 100, 20)
    levels[:, 5] += 40
    sharp, blurred = (canny(grey(levels), sigma, 40 * OPENCV_UNIT, 80 * OPENCV_UNIT) for sigma in (0, 2.0))
    assert sharp[:, 3:8].any() and not blurred[:, 3:8].any()
    assert sharp[:, 18:22].any(axis=1).all() and blurred[:, 18:22].any(axis=1).all()


def test_f1_is_the_mean_of_precision_and_recall_to_a_pixel():
    line = np.zeros((9, 12), bool)
    line[4, 1:11] = True
    assert edge_f1(line, line) == 1 == edge_f1(line, np.roll(line, 1, axis=0))
    assert edge_f1(line, np.roll(line, 2, axis=0)) == 0 < edge_f1(line, np.roll(line, 2, axis=0), tolerance=2)
    half = line.copy()
    half[4, 6:] = False  # all of it is right, and with a pixel's tolerance it reaches 6 of 10
    assert edge_f1(line, half) == pytest.approx(2 * 0.6 / 1.6)
    assert edge_f1(half, line) == pytest.approx(2 * 0.6 / 1.6)
    empty = np.zeros_like(line)
    assert edge_f1(empty, empty) == 1 and edge_f1(empty, line) == edge_f1(line, empty) == 0


def test_dilation_adds_the_eight_neighbours():
    mask = np.zeros((7, 7), bool)
    mask[3, 3] = mask[0, 0] = True
    assert dilated(mask).sum() == 9 + 4 and dilated(mask)[2:5, 2:5].all()
    assert dilated(mask, 0).sum() == 2 and (dilated(mask, 2) == dilated(dilated(mask))).all()


def test_a_hint_is_white_on_black():
    edges = np.eye(6, dtype=bool)
    image = edge_image(edges)
    assert image.mode == "RGB" and (as_floats(image) == edges[..., None]).all()
    assert (hint_picture(edges) == edges).all() and hint_picture(edges).shape == (3, 6, 6)
