"""A picture in the scene of a film."""

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.diffusion.schedule import Grid, ddim_step
from lorakit.motion.camera import Pose, path
from lorakit.motion.shown import REST, Shown, seen_of

GRID = Grid((600, 300, 1), (0.1, 0.4, 0.8, 0.99))


@pytest.fixture
def picture(tmp_path):
    """64 x 64, with as much detail as a film of 32 x 32 can see when it comes twice as near."""
    levels = np.random.default_rng(0).integers(60, 200, (40, 40, 3), np.uint8)
    file = tmp_path / "picture.png"
    Image.fromarray(levels).resize((64, 64), Image.Resampling.BICUBIC).save(file)
    return str(file)


def views(picture, *poses):
    return seen_of(picture, (32, 32), [REST, *poses])


def test_a_camera_that_pans_sees_the_picture_moved_and_where_it_ends(picture):
    seen, inside = views(picture, Pose(x=8.0), Pose(y=-4.0))
    torch.testing.assert_close(seen[1, :, 2:-2, 2:-10], seen[0, :, 2:-2, 10:-2], atol=0.02, rtol=0)
    torch.testing.assert_close(seen[2, :, 6:-2, 2:-2], seen[0, :, 2:-6, 2:-2], atol=0.02, rtol=0)
    assert (seen[1] - seen[0]).abs().max() > 0.2  # it has moved
    assert inside[0].all() and inside[1, 0, :, :24].all() and not inside[1, 0, :, 24:].any()
    assert not inside[2, 0, :4].any() and inside[2, 0, 4:].all()


def test_a_camera_that_comes_nearer_sees_what_a_larger_picture_knows(picture, tmp_path):
    (_, near), inside = views(picture, Pose(scale=2.0))
    with Image.open(picture) as large:
        middle = np.asarray(large.crop((16, 16, 48, 48)), np.float32) / 127.5 - 1
    wanted = torch.from_numpy(middle).permute(2, 0, 1)
    assert inside.all() and (near - wanted).abs().mean() < 0.02
    small = tmp_path / "small.png"
    Image.open(picture).resize((32, 32)).save(small)
    assert (views(str(small), Pose(scale=2.0))[0][1] - wanted).abs().mean() > 0.04


def test_a_camera_that_goes_back_sees_all_of_it_without_aliasing(picture):
    (_, far), inside = views(picture, Pose(scale=0.5))
    with Image.open(picture) as large:
        wanted = np.asarray(large.resize((16, 16), Image.Resampling.BOX), np.float32) / 127.5 - 1
    assert inside[1, 0, 8:24, 8:24].all() and inside[1].sum() == 16 * 16
    assert np.abs(far[:, 8:24, 8:24].permute(1, 2, 0).numpy() - wanted).mean() < 0.03


@pytest.fixture
def shown():
    generator = torch.Generator().manual_seed(0)
    poses = path(3, (64, 64), {"pan": [0, 0.25, 0], "tilt": [0], "zoom": [1], "roll": [0]}, "linear", False)
    inside = torch.ones(3, 1, 8, 8)
    inside[1, :, :, 6:] = 0
    way, known = (torch.randn(4, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator))
    return Shown(way, GRID, poses, known, inside, [0, 2], 8)


def test_while_frames_agree_they_expect_what_they_see_of_the_picture(shown):
    x_0 = torch.zeros(3, 4, 8, 8)
    found = shown(1, x_0, True)
    assert torch.equal(found[0], shown.views[0]) and torch.equal(found[1, ..., :6], shown.views[1, ..., :6])
    assert not found[1, ..., 6:].any()  # beyond it is the model's


def test_a_step_from_what_is_expected_of_the_picture_ends_on_its_path(shown):
    for i in range(len(GRID)):
        x_0 = shown(i, torch.randn(2, 4, 8, 8)[[0, 1, 0]], False)
        here, there = GRID.alpha_bar[i : i + 2]
        for frame in (0, 2):
            eps = (shown.path[i] - here**0.5 * x_0[frame]) / (1 - here) ** 0.5
            torch.testing.assert_close(ddim_step(shown.path[i], eps, here, there), shown.path[i + 1])
        eps = (shown.path[i] - here**0.5 * x_0[1]) / (1 - here) ** 0.5
        assert (ddim_step(shown.path[i], eps, here, there) - shown.path[i + 1]).abs().max() > 0.1


def test_what_the_picture_s_step_misses_moves_with_the_camera(shown):
    x_0 = torch.zeros(3, 4, 8, 8)
    missed = shown.expected[0]
    found = shown(0, x_0, False)  # a pan of two latent pixels to the right
    torch.testing.assert_close(found[1, ..., 1:5], missed[..., 3:7], atol=1e-4, rtol=0)
    assert not found[1, ..., 6:].any()
    assert torch.equal(found[0], missed)
