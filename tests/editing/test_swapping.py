"""Edits on a tiny U-Net: the same words give the picture to the bit, other words do not; masks hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.editing.swapping import (
    Source,
    blended,
    composed,
    last,
    latent_mask,
    redraw,
    rows_of,
    share_of,
    swap,
    with_reach,
)

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())
STEPS = 6


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def embeds(count, seed):
    return torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["ddim", "ab2"])
def desk(request, tiny_unet):
    """(denoiser, source) of a picture inverted under a prompt of its own, by each solver."""
    with torch.no_grad():
        denoiser, grid = Denoiser(tiny_unet(), SCHEDULE), SCHEDULE.grid(STEPS, request.param)
        row = Rows(embeds(1, 0), embeds(1, 1), torch.zeros(1, 0))
        clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        found = [clean, *inversion.invert(clean, grid, lambda x, t: denoiser(x, t, row))]
        return denoiser, Source(torch.stack(found[::-1]), row, grid)


def rms(found):
    return float(found.square().mean().sqrt())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("start", [0, 4])
def test_the_picture_s_own_words_give_it_to_the_bit_and_others_do_not(desk, guidance, start):
    denoiser, source = desk
    words = torch.cat([embeds(1, 7), source.row.prompt_embeds, embeds(1, 8)])
    found = last(swap(denoiser, source, rows_of(source.row, words), guidance_scale=guidance, start=start))
    assert torch.equal(found[1:2], source.latents)
    assert all(rms(found[i] - source.latents[0]) > 1e-3 for i in (0, 2))


@pytest.mark.parametrize("start", [0, 4])
def test_the_reach_is_1_where_words_lead_farthest_and_0_where_they_lead_nowhere(desk, start):
    denoiser, source = desk
    words = torch.cat([embeds(1, 7), source.row.prompt_embeds])
    where = torch.ones(1, 1, 8, 8)
    where[..., 3:] = 0
    options = dict(start=start, where=where)
    latents, reach = with_reach(swap(denoiser, source, rows_of(source.row, words), **options), source.path)
    assert torch.equal(latents, last(swap(denoiser, source, rows_of(source.row, words), **options)))
    assert reach.shape == (2, 8, 8) and reach[0].max() <= 1 and reach[0, :, :3].min() > 0
    assert not reach[0, :, 3:].any() and not reach[1].any()


def test_the_share_is_a_ramp_from_half_of_the_threshold_on():
    reach = torch.tensor([[0.0, 0.1], [0.15, 0.2]])
    share = share_of(reach, 0.2, 8)
    assert share.shape == (16, 16)
    corners = [share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]]
    np.testing.assert_allclose(corners, [0, 0, 0.5, 1], atol=1e-6)
    one, other = (Image.new("RGB", (16, 16), colour) for colour in ("white", "black"))
    found = np.asarray(blended(one, other, share))
    assert (found[:4] == 0).all() and (found[-1, -1] == 255).all() and 120 < found[-1, 0, 0] < 135


def test_a_row_does_not_depend_on_its_batch(desk):
    denoiser, source = desk
    words = embeds(3, 9)
    together = last(swap(denoiser, source, rows_of(source.row, words)))
    for i in range(3):
        alone = last(swap(denoiser, source, rows_of(source.row, words[i : i + 1])))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    assert rms(together[0] - together[1]) > 1e-3


def test_a_later_start_changes_less_and_costs_less(desk):
    denoiser, source = desk
    rows, moved, spent = rows_of(source.row, embeds(1, 9)), [], []
    for start in (0, 2, 4, 5):
        before = denoiser.evaluations
        moved.append(rms(last(swap(denoiser, source, rows, start=start)) - source.latents))
        spent.append(denoiser.evaluations - before)
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0
    assert spent == [2 * (STEPS - start) for start in (0, 2, 4, 5)]


def test_sdedit_leaves_more_of_the_picture_the_later_it_starts_and_depends_on_its_noise(desk):
    denoiser, source = desk
    rows = rows_of(source.row, embeds(2, 9))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = [last(redraw(denoiser, source, rows, noise, start=start)) for start in (0, 3, 5)]
    moved = [rms(each - source.latents) for each in found]
    assert moved == sorted(moved, reverse=True)
    other = last(redraw(denoiser, source, rows, -noise, start=3))
    assert rms(other - found[1]) > 1e-2


@pytest.mark.parametrize("method", ["swap", "redraw"])
def test_outside_of_the_mask_the_latents_are_the_picture_s(desk, method):
    denoiser, source = desk
    mask = np.zeros((16, 16), np.float32)
    mask[5:9, 5:9] = 1  # cells 2 to 4 of two pixels each
    where = latent_mask(mask, 2, "cpu")
    assert where.shape == (1, 1, 8, 8) and where.sum() == 9
    rows = rows_of(source.row, embeds(1, 9))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def edited(where):
        if method == "swap":
            return last(swap(denoiser, source, rows, where=where))
        return last(redraw(denoiser, source, rows, noise, where=where))

    found, inside = edited(where), where.expand_as(source.latents) > 0
    assert torch.equal(found[~inside], source.latents[~inside])
    assert rms(found[inside] - source.latents[inside]) > 1e-3
    assert rms(edited(None)[~inside] - source.latents[~inside]) > 1e-3


def test_pixels_outside_of_the_mask_are_the_round_trip_s_to_the_bit_and_join_without_a_step():
    rng = np.random.default_rng(0)
    trip = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    edited = Image.fromarray(255 - np.asarray(trip))
    mask = np.zeros((48, 48), np.float32)
    mask[8:40, 8:40] = 1
    found = np.asarray(composed(edited, trip, mask, 8), np.int16)
    a, b = (np.asarray(each, np.int16) for each in (trip, edited))
    assert (found[mask == 0] == a[mask == 0]).all()
    assert (found[20:28, 20:28] == b[20:28, 20:28]).all()
    share = (found - a)[24] / np.where(b - a == 0, 1, b - a)[24]  # along a row, from rim to rim
    assert 0 < share[9].mean() < 0.5 < share[14].mean()
    everywhere = composed(edited, trip, np.ones_like(mask), 8)
    assert (np.asarray(everywhere) == np.asarray(edited)).all()
    half = np.asarray(composed(edited, trip, np.full_like(mask, 0.5), 8), np.int16)
    assert np.abs(half - (a + b) / 2).max() <= 1.5
