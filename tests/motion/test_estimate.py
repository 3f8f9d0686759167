"""What moved, measured on pictures whose move is known."""

import functools
import math

import numpy as np
import pytest
from PIL import Image

from lorakit.motion.camera import Move, between, path
from lorakit.motion.estimate import moves

REST = {"pan": [0.0], "tilt": [0.0], "zoom": [1.0], "roll": [0.0]}


def world(seed=0, size=480):
    """A picture with something at every scale."""
    rng, whole = np.random.default_rng(seed), np.zeros((size, size, 3))
    for side in (6, 15, 40, 120):
        small = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        whole += np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(whole.astype(np.uint8))


def film(shape=(96, 96), frames=4, **keys):
    """What a camera sees of the world, and its poses."""
    poses, picture = path(frames, shape, REST | keys, "linear", False), world()
    found = []
    for pose in poses:
        cos, sin = math.cos(pose.angle) / pose.scale, math.sin(pose.angle) / pose.scale
        x, y = picture.width / 2 + pose.x, picture.height / 2 + pose.y
        left, top = shape[0] / 2, shape[1] / 2
        affine = (cos, -sin, x - cos * left + sin * top, sin, cos, y - sin * left - cos * top)
        found.append(picture.transform(shape, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    return found, poses


@pytest.mark.parametrize(
    "keys",
    [
        {"pan": [0, 0.3]},
        {"pan": [0, -0.3]},
        {"tilt": [0, 0.2]},
        {"zoom": [1, 1.3]},
        {"zoom": [1, 0.8]},
        {"roll": [0, 15]},
        {"roll": [0, -15]},
        {"pan": [0, 0.15], "zoom": [1, 1.2], "roll": [0, 8]},
    ],
    ids=str,
)
def test_a_known_camera_is_found(keys):
    frames, poses = film(**keys)
    found, fitted, still = moves(frames)
    whole, asked = functools.reduce(Move.then, found), between(poses[0], poses[-1])
    assert (whole.dx, whole.dy) == pytest.approx((asked.dx, asked.dy), abs=1.0)
    assert (whole.log_scale, whole.angle) == pytest.approx((asked.log_scale, asked.angle), abs=0.015)
    assert min(fitted) > 28 and all(a > b + 5 for a, b in zip(fitted, still, strict=True))


def test_the_units_are_pixels_of_the_frames_whatever_their_aspect():
    frames, _ = film(shape=(144, 80), pan=[0, 0.25])
    whole = functools.reduce(Move.then, moves(frames)[0])
    assert (whole.dx, whole.dy) == pytest.approx((-36, 0), abs=1.0)


def test_a_still_film_has_not_moved_and_frames_of_other_scenes_fit_no_move():
    frames, _ = film()
    found, fitted, _ = moves(frames)
    assert all(vars(move) == pytest.approx(vars(Move(0, 0, 0, 0)), abs=1e-6) for move in found)
    assert min(fitted) > 60
    others = [world(seed).resize((96, 96)) for seed in range(3)]
    assert max(moves(others)[1]) < 22


def test_what_stands_still_in_a_part_of_the_picture_counts_little():
    frames, poses = film(pan=[0, 0.2])
    for frame in frames:
        frame.paste((200, 30, 30), (0, 0, 24, 24))
    whole = functools.reduce(Move.then, moves(frames)[0])
    assert whole.dx == pytest.approx(between(poses[0], poses[-1]).dx, abs=3.0)
