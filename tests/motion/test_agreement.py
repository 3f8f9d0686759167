"""Frames that agree about their scene."""

import pytest
import torch

from lorakit.motion.agreement import Agreement
from lorakit.motion.camera import path

REST = {"pan": [0.0], "tilt": [0.0], "zoom": [1.0], "roll": [0.0]}


def agreement(frames=5, reach=2.0, loop=False, shape=(12, 16), **keys):
    poses = path(frames, (shape[1] * 8, shape[0] * 8), REST | keys, "linear", loop)
    return Agreement(poses, shape, 8, reach, loop)


def smooth(frames=5, shape=(12, 16)):
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(frames, 4, 4, 5, generator=generator)
    return torch.nn.functional.interpolate(small, shape, mode="bicubic", align_corners=True)


def test_frames_that_agree_stay_as_they_are():
    same = smooth()[:1].expand(5, -1, -1, -1)
    torch.testing.assert_close(agreement()(same), same, atol=1e-5, rtol=0)
    different = smooth()
    assert (agreement()(different) - different).abs().max() > 0.1


def test_a_camera_at_rest_averages_and_the_nearer_frame_counts_more():
    latents = torch.zeros(5, 1, 12, 16)
    latents[2] = 1.0
    means = agreement(reach=1.0)(latents).mean((1, 2, 3))
    assert means[2] > means[1] > means[0] > 0
    assert means[1] == pytest.approx(float(means[3]))
    lone = agreement(reach=0.1)(latents).mean((1, 2, 3))
    assert lone.tolist() == [0, 0, 1, 0, 0]


def test_a_thing_of_the_scene_is_found_where_the_camera_has_moved_it():
    latents = torch.zeros(2, 1, 12, 16)
    latents[0, 0, 5, 9] = 1.0  # a pan of two latent pixels to the right takes it to column 7
    seen = agreement(frames=2, reach=100.0, pan=[0, 2 / 16])(latents)[1, 0]
    row, column = divmod(int(seen.argmax()), 16)
    assert (row, column) == (5, 7) and float(seen.max()) == pytest.approx(0.5, abs=0.01)
    still = agreement(frames=2, reach=100.0)(latents)[1, 0]
    assert divmod(int(still.argmax()), 16) == (5, 9)


def test_what_only_one_frame_sees_is_its_own():
    latents = smooth(2)
    found = agreement(frames=2, reach=100.0, pan=[0, 0.5])(latents)
    torch.testing.assert_close(found[1][:, :, 9:], latents[1][:, :, 9:], atol=1e-5, rtol=0)
    assert (found[1][:, :, :7] - latents[1][:, :, :7]).abs().max() > 0.1


def test_in_a_loop_the_last_frame_is_the_first_one_s_neighbour():
    latents = torch.zeros(6, 1, 12, 16)
    latents[5] = 1.0
    looped, straight = (agreement(6, 1.0, loop)(latents)[0].mean() for loop in (True, False))
    assert looped > 0.1 and straight == 0
