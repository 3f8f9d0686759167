"""Things moved and stretched: where they come to lie, what stays to the bit, what is put in their place."""

import numpy as np
import pytest

from lorakit.pictures import warping

SHAPE = (40, 48)


@pytest.fixture
def scene():
    """A bright disc at (14.5, 20.5) on a slope of grey."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    slope = np.stack([x / 48, y / 40, (x + y) / 88], 2).astype(np.float32)
    share = warping.disc(SHAPE, (14.5, 20.5), 4)[..., None]
    return slope, (1 - share) * slope + share


def test_a_moved_thing_stands_at_its_target_and_what_was_behind_it_goes_on(scene):
    slope, picture = scene
    way = ((14.5, 20.5), (32.5, 18.5))
    mask = warping.capsule(SHAPE, [way], 12)
    found = warping.move(picture, [way], 4, mask)
    assert np.abs(found[18, 32] - 1).max() < 1e-6  # whole pixels: nothing is blurred
    hole = warping.disc(SHAPE, way[0], 4) > 0
    assert np.abs(found[hole] - slope[hole]).max() < 1e-3 < np.abs(picture[hole] - slope[hole]).max()
    assert (found[~mask] == picture[~mask]).all() and (found[mask] != picture[mask]).any()


def test_a_way_of_no_length_changes_nothing(scene):
    _, picture = scene
    way = ((14.5, 20.5), (14.5, 20.5))
    mask = warping.capsule(SHAPE, [way], 10)
    assert (warping.move(picture, [way], 4, mask) == picture).all()
    assert (warping.stretch(picture, [way], mask) == picture).all()
    values = np.random.default_rng(0).normal(size=(*SHAPE, 4))
    assert (warping.exchange(values, [way], 4) == values).all()


def test_a_stretch_takes_the_handle_to_its_target_and_leaves_the_edge(scene):
    _, picture = scene
    way = ((14.5, 20.5), (19.5, 16.5))
    mask = warping.capsule(SHAPE, [way], 13)
    found, field = warping.stretch(picture, [way], mask), warping.stretch_field([way], mask)
    assert np.abs(found[16, 19] - picture[20, 14]).max() < 1e-3
    assert np.abs(field[16, 19] - (5, -4)).max() < 1e-3 and not field[~mask].any()
    assert (found[~mask] == picture[~mask]).all()
    lengths = np.hypot(*field[16, 19:33].T)  # from the target to the edge
    assert (np.diff(lengths) < 1e-6).all() and lengths[-1] < 0.3 * lengths[0]


def test_two_targets_each_have_their_own_way(scene):
    _, picture = scene
    ways = [((14.5, 20.5), (14.5, 15.5)), ((34.5, 20.5), (34.5, 26.5))]
    field = warping.stretch_field(ways, warping.capsule(SHAPE, ways, 12))
    assert np.abs(field[15, 14] - (0, -5)).max() < 0.05 and np.abs(field[26, 34] - (0, 6)).max() < 0.05


@pytest.mark.parametrize("place", [(20, 20), (0, 3), (39, 47)])
def test_a_hole_in_a_slope_is_filled_with_the_slope_and_one_at_the_rim_evenly(scene, place):
    slope, _ = scene
    hole = np.zeros(SHAPE, bool)
    hole[max(place[0] - 4, 0) : place[0] + 5, max(place[1] - 4, 0) : place[1] + 5] = True
    broken = np.where(hole[..., None], 9, slope).astype(np.float32)
    found = warping.fill(broken, hole)
    assert (found[~hole] == slope[~hole]).all()
    rim = slope[warping._grow(hole) & ~hole]
    assert (found[hole] >= rim.min(0) - 1e-4).all() and (found[hole] <= rim.max(0) + 1e-4).all()
    if place == (20, 20):
        assert np.abs(found - slope).max() < 1e-4


def test_the_distance_to_the_edge_is_that_to_the_nearest_pixel_outside():
    mask = np.random.default_rng(0).uniform(size=(13, 17)) < 0.8
    outside = np.argwhere(~mask)
    found = warping.distance_to_edge(mask)
    for i, j in np.ndindex(*mask.shape):
        wanted = np.hypot(*(outside - (i, j)).T).min()
        assert found[i, j] == pytest.approx(wanted)
    whole = warping.distance_to_edge(np.ones((5, 7), bool))
    assert whole[2].tolist() == [0, 1, 2, 2, 2, 1, 0]


@pytest.mark.parametrize("step", [(9, 2), (2, 1), (-30, 0)])
def test_moved_noise_is_the_same_numbers_and_the_target_has_the_handle_s(step):
    values = np.random.default_rng(0).normal(size=(*SHAPE, 4))
    start = (20.5, 20.5)
    end = (start[0] + step[0], start[1] + step[1])
    found = warping.exchange(values, [(start, end)], 4)
    assert np.array_equal(np.sort(found, axis=None), np.sort(values, axis=None))
    assert (found != values).any() or step == (-30, 0)
    if step != (-30, 0):  # from there all of it would leave the picture
        assert (found[20 + step[1], 20 + step[0]] == values[20, 20]).all()
