"""Noise that lies in the scene: white in every frame, and carried by the camera."""

import pytest
import torch

from lorakit.ground.randomness import normal
from lorakit.motion.camera import Pose, path
from lorakit.motion.carried_noise import Scene, film_noise

SHAPE = (4, 16, 24)
STILL = normal(SHAPE, 5, "sample")
REST = {"pan": [0.0], "tilt": [0.0], "zoom": [1.0], "roll": [0.0]}


def film(frames=5, share=1.0, seed=5, **keys):
    poses = path(frames, (24 * 8, 16 * 8), REST | keys, "linear", False)
    return film_noise(STILL, seed, poses, 8, share)


def test_a_camera_at_its_start_sees_the_noise_of_a_picture_whatever_it_does_later():
    for keys in ({}, {"pan": [0, 0.5]}, {"zoom": [1, 2]}):
        torch.testing.assert_close(film(**keys)[0], STILL, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keys", "right", "down"), [({"pan": [0, 4 / 24]}, 1, 0), ({"tilt": [0, -0.25]}, 0, 1)]
)
def test_a_move_by_whole_latent_pixels_moves_the_noise_to_the_digit(keys, right, down):
    frames = film(**keys)
    for a, b in zip(frames[:-1], frames[1:], strict=True):
        torch.testing.assert_close(b[:, : 16 - down, : 24 - right], a[:, down:, right:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "pose", [Pose(3.3, 1.7), Pose(0, 0, 1.4), Pose(0, 0, 0.7), Pose(5, -60, 1.2, 0.4), Pose(0, 0, 1, 2.0)]
)
def test_every_frame_is_white_noise_wherever_the_camera_is(pose):
    still = normal((64, 16, 24), 1, "sample")
    noise = Scene(still, 1).seen(pose, 8)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    across, down = (noise[:, :, 1:] * noise[:, :, :-1]).mean(), (noise[:, 1:] * noise[:, :-1]).mean()
    assert across.abs() < 0.02 and down.abs() < 0.02
    assert (noise.std((0,)) - 1).abs().max() < 0.5  # in every place


def test_what_two_near_frames_share_fades_with_their_distance():
    scene = Scene(STILL, 5)
    likeness = [float((scene.seen(Pose(x), 8) * STILL).mean()) for x in (0, 2, 4, 6, 8, 16)]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[0] > 0.9 and abs(likeness[4]) < 0.1 > abs(likeness[5])
    assert likeness[2] == pytest.approx(0.5 * likeness[0], abs=0.06)


def test_the_share_of_the_scene_is_that_of_the_variance_and_the_rest_is_each_frame_s_own():
    own, common = film(share=0.0), film(share=0.64)
    assert (own[0] * own[1]).mean().abs() < 0.1
    assert float((common[0] * common[1]).mean()) == pytest.approx(0.64, abs=0.08)
    assert (common.std() - 1).abs() < 0.05
    torch.testing.assert_close(film(), STILL.expand(5, -1, -1, -1), atol=1e-5, rtol=0)


def test_it_follows_from_the_seed():
    assert torch.equal(film(pan=[0, 1]), film(pan=[0, 1]))
    one, other = film(pan=[0, 2]), film(pan=[0, 2], seed=6)
    assert not torch.allclose(one[-1], other[-1])


def test_magnified_beyond_its_cells_it_stays_noise():
    noise = Scene(STILL, 5).seen(Pose(0, 0, 30.0), 8)
    assert noise.isfinite().all() and 0.9 < noise.std() < 1.1
