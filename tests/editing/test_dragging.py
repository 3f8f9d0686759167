"""Features dragged on maps that translate, without a U-Net: what follows, what arrives, what is held fast."""

import math

import pytest
import torch

from lorakit.editing.dragging import Following, drag_latents, follow, motion_loss, read, square
from lorakit.ground.errors import DivergedError

GRID = (24, 20)


def bump(x, y, width=24, height=20, channels=6):
    """(1, C, h, w): a hill at (x, y) whose channels are wider and wider."""
    rows, columns = torch.arange(float(height))[:, None], torch.arange(float(width))
    squared = (rows - y) ** 2 + (columns - x) ** 2
    return torch.stack([torch.exp(-squared / (3.0 * 2**k)) for k in range(channels)])[None]


def places(features, x, y):
    return read(features, torch.tensor([[x, y]]), GRID)[0]


def test_a_coarse_map_is_read_as_its_enlargement_would_be():
    coarse = torch.randn(1, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear", align_corners=False)
    cells = torch.tensor([[x, y] for x, y in ((0, 0), (5, 7), (11, 19), (23, 0), (23, 19))]).float()
    wanted = torch.stack([large[0, :, int(y), int(x)] for x, y in cells])
    torch.testing.assert_close(read(coarse, cells, GRID), wanted, rtol=1e-5, atol=1e-5)
    between = read(large, torch.tensor([[5.5, 7.0]]), GRID)[0]
    torch.testing.assert_close(between, (large[0, :, 7, 5] + large[0, :, 7, 6]) / 2)


@pytest.mark.parametrize("step", [(2, 1), (-3, 0), (3, -3), (0, 0)])
def test_a_handle_is_found_where_the_map_was_moved_to_and_no_further_than_it_looks(step):
    how = Following(GRID, track_radius=3)
    pattern = places(bump(10, 9), 10.0, 9.0)
    moved = bump(10 + step[0], 9 + step[1])
    assert follow(moved, pattern, (10.0, 9.0), how) == (10 + step[0], 9 + step[1])
    near = follow(moved, pattern, (10.0, 9.0), Following(GRID, track_radius=1))
    assert max(abs(near[0] - 10), abs(near[1] - 9)) <= 1
    corner = follow(bump(0, 0), places(bump(0, 0), 0.0, 0.0), (1.0, 1.0), how)
    assert corner == (0, 0)  # not outside of the map


def test_the_loss_pulls_the_handle_to_the_target_and_nothing_that_has_arrived():
    how, centre = Following(GRID), torch.tensor([10.0, 9.0], requires_grad=True)

    def gradient(target):
        features = bump(*centre)
        (found,) = torch.autograd.grad(motion_loss(features, [(10.0, 9.0)], [target], how), centre)
        return -found

    right, down = gradient((18.0, 9.0)), gradient((10.0, 16.0))
    assert right[0] > 0.1 and abs(right[1]) < 1e-3 and down[1] > 0.1 and abs(down[0]) < 1e-3
    with torch.no_grad():
        features = bump(10, 9)
        assert motion_loss(features, [(10.0, 9.0)], [(11.0, 9.0)], how) == 0  # within NEAR
        assert motion_loss(features, [(10.0, 9.0)], [(18.0, 9.0)], how) > 0


def hill(latents):
    """Features of latents (1, 2, 1, 1): a hill at the place that they hold."""
    return bump(*latents.flatten()), latents


def test_a_hill_is_dragged_to_its_target_and_the_last_pull_says_so():
    start = torch.tensor([8.0, 9.0]).view(1, 2, 1, 1)
    how = Following(GRID, iterations=80, learning_rate=0.3)
    pulls = list(drag_latents(hill, start, [((8.0, 9.0), (18.0, 9.0))], how))
    assert pulls[-1].arrived and not any(pull.arrived for pull in pulls[:-1]) and len(pulls) < 80
    assert math.dist(pulls[-1].handles[0], (18, 9)) < 2 and abs(pulls[-1].latents.flatten()[0] - 18) < 3
    assert torch.equal(pulls[0].latents, start) and pulls[0].handles == ((8.0, 9.0),)
    few = list(drag_latents(hill, start, [((8.0, 9.0), (18.0, 9.0))], Following(GRID, iterations=3)))
    assert len(few) == 4 and not few[-1].arrived
    still = list(drag_latents(hill, start, [((8.0, 9.0), (8.0, 9.0))], how))
    assert len(still) == 1 and still[0].arrived and torch.equal(still[0].latents, start)


def test_what_the_mask_holds_fast_moves_less():
    start = torch.tensor([8.0, 9.0]).view(1, 2, 1, 1)

    def moved(weight, outside):
        how = Following(GRID, iterations=10, learning_rate=0.3, mask_weight=weight)
        pulls = list(drag_latents(hill, start, [((8.0, 9.0), (18.0, 9.0))], how, outside))
        return float((pulls[-1].latents - start).abs().max())

    free, held = moved(0.1, None), moved(100.0, torch.ones(1, 1, 1, 1))
    assert held < 0.5 < 1 < free
    assert moved(100.0, torch.zeros(1, 1, 1, 1)) == pytest.approx(free)


def test_features_that_are_no_numbers_end_it():
    def broken(latents):
        return hill(latents)[0] * math.nan, latents

    with pytest.raises(DivergedError, match="lower learning_rate"):
        list(drag_latents(broken, torch.zeros(1, 2, 1, 1), [((8.0, 9.0), (18.0, 9.0))], Following(GRID)))


def test_the_square_about_a_place_goes_row_by_row():
    assert square((5.0, 2.0), 1).tolist() == [[x, y] for y in (1, 2, 3) for x in (4, 5, 6)]
