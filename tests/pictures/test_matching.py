"""What was in one picture is found again in another, whatever its brightness, where it is looked for."""

import numpy as np
import pytest

from lorakit.pictures.matching import find_again

EVERYWHERE = np.ones((40, 48), bool)


@pytest.fixture
def scene():
    return np.random.default_rng(0).normal(size=(40, 48, 3)).astype(np.float32)


@pytest.mark.parametrize("step", [(0, 0), (9, -4), (-11, 7)])
@pytest.mark.parametrize("place", [(20.5, 17.5), (22.25, 15.75)])
def test_a_patch_that_was_moved_is_found_at_its_new_place(scene, step, place):
    moved = 0.5 * np.roll(scene, step[::-1], axis=(0, 1)) + 0.2
    found, likeness = find_again(moved, scene, place, 3, EVERYWHERE)
    assert found == pytest.approx((place[0] + step[0], place[1] + step[1]))
    assert likeness == pytest.approx(1, abs=1e-5)
    _, elsewhere = find_again(scene[::-1], scene, place, 3, EVERYWHERE)
    assert elsewhere < 0.8


def test_it_is_looked_for_where_it_may_be(scene):
    moved = np.roll(scene, 10, axis=1)
    where = EVERYWHERE.copy()
    where[:, 28:33] = False
    found, likeness = find_again(moved, scene, (20.5, 17.5), 3, where)
    assert not 28 <= found[0] < 33 and likeness < 0.8


def test_it_is_found_at_the_rim_too_and_a_flat_picture_holds_nothing(scene):
    found, likeness = find_again(scene, scene, (0.5, 39.5), 4, EVERYWHERE)
    assert found == (0.5, 39.5) and likeness == pytest.approx(1, abs=1e-5)
    _, likeness = find_again(np.zeros_like(scene), scene, (20.5, 17.5), 3, EVERYWHERE)
    assert abs(likeness) < 1e-3
