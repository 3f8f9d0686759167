"""A moved picture healed on a tiny U-Net: what has not moved is the picture to the bit."""

import pytest
import torch

from lorakit.diffusion import inversion
from lorakit.diffusion.attention import SharedAttention
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.editing.healing import heal, moved_latents
from lorakit.editing.swapping import Source, last

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())
STEPS = 6
WAY = ((2.0, 4.0), (6.0, 4.0))


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def desk(tiny_unet):
    """(denoiser that can look at the picture, source of a picture)"""
    with torch.no_grad():
        unet = tiny_unet(
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
        )
        denoiser = Denoiser(unet, SCHEDULE, shared=SharedAttention(unet, "kv"))
        row = Rows(noise(0, 1, 5, 16), noise(1, 1, 5, 16), torch.zeros(1, 0))
        clean, grid = noise(2, 1, 4, 8, 8), SCHEDULE.grid(STEPS)
        found = [clean, *inversion.invert(clean, grid, lambda x, t: denoiser(x, t, row))]
        return denoiser, Source(torch.stack(found[::-1]), row, grid)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("attention", [True, False])
def test_the_picture_s_own_latents_give_it_to_the_bit_and_others_do_not(desk, guidance, attention):
    denoiser, source = desk
    options = {"start": 3, "guidance_scale": guidance, "reference_attention": attention}
    assert torch.equal(last(heal(denoiser, source, source.path[3], **options)), source.latents)
    other = last(heal(denoiser, source, source.path[3] + 0.1, **options))
    assert (other - source.latents).abs().max() > 1e-2


def test_the_result_looks_at_the_picture(desk):
    denoiser, source = desk
    start = source.path[3] + noise(5, 1, 4, 8, 8)
    found = [last(heal(denoiser, source, start, start=3, reference_attention=on)) for on in (True, False)]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["moved", "own"])
def test_latents_of_a_picture_that_was_not_moved_are_those_of_its_path(desk, kind):
    _, source = desk
    still = (WAY[0], WAY[0])
    assert torch.equal(moved_latents(source, source.latents, 3, [still], 1.5, kind), source.path[3])


def test_noise_goes_along_with_the_thing_or_stays(desk):
    _, source = desk
    a = source.grid.alpha_bar[3]

    def noise_of(latents, clean):
        return (latents - a**0.5 * clean) / (1 - a) ** 0.5

    moved = source.latents.roll(4, 3)
    before = noise_of(source.path[3], source.latents)
    own = noise_of(moved_latents(source, moved, 3, [WAY], 1.0, "own"), moved)
    along = noise_of(moved_latents(source, moved, 3, [WAY], 1.0, "moved"), moved)
    torch.testing.assert_close(own, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(along[..., 4, 6], before[..., 4, 2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(along.flatten(2).sort()[0], before.flatten(2).sort()[0], rtol=1e-3, atol=1e-3)
    assert (along - before).abs().max() > 0.1


def test_outside_of_the_mask_nothing_changes(desk):
    denoiser, source = desk
    where = torch.zeros(1, 1, 8, 8)
    where[..., 2:7, 1:8] = 1
    start = moved_latents(source, source.latents + 1, 3, [WAY], 1.0, "moved", where)
    found, kept = last(heal(denoiser, source, start, start=3, where=where)), where.expand(1, 4, 8, 8) == 0
    assert torch.equal(start[kept], source.path[3][kept]) and torch.equal(found[kept], source.latents[kept])
    assert (found[~kept] - source.latents[~kept]).abs().max() > 1e-2
