"""Where the camera looks, and how what it sees moves."""

import cmath
import functools
import math
from itertools import pairwise

import pytest

from lorakit.motion.camera import Move, Pose, between, moments, path, track
from lorakit.motion.windows import windows

REST = {"pan": [0.0], "tilt": [0.0], "zoom": [1.0], "roll": [0.0]}


def film(frames=9, shape=(128, 64), easing="linear", loop=False, **keys):
    return path(frames, shape, REST | keys, easing, loop)


def seen(pose: Pose, place: complex) -> complex:
    """Where in the picture, from its centre, a camera shows a place of the scene."""
    return (place - complex(pose.x, pose.y)) * cmath.rect(pose.scale, -pose.angle)


def test_a_pan_to_the_right_moves_things_to_the_left_by_widths_and_a_tilt_up_moves_them_down_by_heights():
    poses = film(pan=[0, 0.25], tilt=[0, 0.5])
    move = between(poses[0], poses[-1])
    assert (move.dx, move.dy, move.log_scale, move.angle) == pytest.approx((-32, 32, 0, 0))
    assert [pose.x for pose in poses] == pytest.approx([4 * i for i in range(9)])


def test_a_zoom_grows_and_a_camera_that_rolls_clockwise_turns_the_picture_the_other_way():
    poses = film(zoom=[1, 1.5], roll=[0, 20])
    move = between(poses[0], poses[-1])
    assert (move.log_scale, math.degrees(move.angle)) == pytest.approx((math.log(1.5), -20))
    assert (move.dx, move.dy) == pytest.approx((0, 0))


@pytest.mark.parametrize("place", [0, 10 + 5j, -30 + 2j])
def test_a_move_takes_each_place_from_where_it_was_seen_to_where_it_is_seen(place):
    a, b = Pose(3, -2, 1.2, 0.1), Pose(-7, 4, 0.8, -0.3)
    move = between(a, b)
    moved = seen(a, place) * cmath.rect(math.exp(move.log_scale), move.angle) + complex(move.dx, move.dy)
    assert moved == pytest.approx(seen(b, place))


def test_moves_put_together_are_the_move_from_the_first_to_the_last():
    poses = film(pan=[0, -0.3], tilt=[0, 0.2], zoom=[1, 1.4], roll=[0, 12])
    steps = [between(*pair) for pair in pairwise(poses)]
    whole, parts = between(poses[0], poses[-1]), functools.reduce(Move.then, steps)
    assert vars(parts) == pytest.approx(vars(whole))
    assert vars(functools.reduce(Move.then, reversed(steps)))["dx"] != pytest.approx(whole.dx)


def test_keys_hold_at_moments_spread_evenly_and_a_loop_comes_back():
    assert track([0, 4, 0], 5, "linear", False) == pytest.approx([0, 2, 4, 2, 0])
    assert track([0, 4], 4, "linear", True) == pytest.approx([0, 2, 4, 2])
    assert track([3.0], 3, "linear", False) == [3, 3, 3] == track([3.0], 3, "linear", True)
    assert moments(2, 4, True) == [0, 0.5, 1, 1.5] and moments(3, 3, False) == [0, 1, 2]


def test_easing_keeps_the_moments_and_is_slow_at_them():
    even, eased = (track([0, 8], 9, easing, False) for easing in ("linear", "cosine"))
    assert (eased[0], eased[4], eased[8]) == pytest.approx((0, 4, 8))
    assert eased[1] < even[1] and eased[7] > even[7]


@pytest.mark.parametrize(("frames", "loop"), [(8, False), (9, False), (20, False), (20, True), (23, True)])
def test_windows_cover_every_frame_and_share_some_with_their_neighbours(frames, loop):
    found = windows(frames, 8, 3, loop)
    assert {i for window in found for i, _ in window} == set(range(frames))
    assert all(len(window) == 8 and all(weight > 0 for _, weight in window) for window in found)
    ahead = found[1:] + found[:1] * loop if len(found) > 1 else []
    for window, later in zip(found, ahead, strict=False):
        assert {i for i, _ in window} & {i for i, _ in later}


def test_a_short_film_is_one_window_whose_frames_count_alike():
    assert windows(5, 8, 3, True) == [[(i, 1.0) for i in range(5)]]
