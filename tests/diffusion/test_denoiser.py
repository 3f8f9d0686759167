"""The U-Net as a function to noise: guidance, counting, and rows that know nothing of each other."""

import pytest
import torch

from lorakit.diffusion.attention import Between, SharedAttention
from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())
EVERY = ("down", "mid", "up")


def batch(count, adapters=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    embeds, negative = torch.randn(2, count, 5, 16, generator=rng)
    return torch.randn(count, 4, 8, 8, generator=rng), Rows(
        embeds, negative, torch.rand(count, adapters, generator=rng)
    )


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_noise_is_the_output_of_the_unet(tiny_unet):
    unet = tiny_unet()
    latents, rows = batch(2, adapters=0)
    found = Denoiser(unet, SCHEDULE)(latents, 300, rows)
    torch.testing.assert_close(found, unet(latents, 300, rows.prompt_embeds).sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_follows_the_library_s_formula(adapted_unet, scale):
    unet, _ = adapted_unet()
    latents, rows = batch(3)
    denoiser = Denoiser(unet, SCHEDULE, "ab")
    positive = denoiser(latents, 300, rows)
    negative = denoiser(latents, 300, Rows(rows.negative_embeds, rows.negative_embeds, rows.weights))
    found = denoiser(latents, 300, rows, scale)
    wanted = negative + scale * (positive - negative)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    other = positive + scale * (positive - negative)  # the paper's convention, one more
    assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guidance_and_parameterisation_commute(tiny_unet, prediction_type):
    schedule = NoiseSchedule(SCHEDULE.alpha_bar, prediction_type)
    unet = tiny_unet()
    latents, rows = batch(2, adapters=0)
    denoiser = Denoiser(unet, schedule)
    positive = schedule.epsilon(unet(latents, 300, rows.prompt_embeds).sample, latents, 300)
    negative = schedule.epsilon(unet(latents, 300, rows.negative_embeds).sample, latents, 300)
    found = denoiser(latents, 300, rows, 3.0)
    torch.testing.assert_close(found, negative + 3 * (positive - negative), rtol=1e-4, atol=1e-4)


def test_evaluations_are_counted_per_row_twice_with_guidance(adapted_unet):
    denoiser = Denoiser(adapted_unet()[0], SCHEDULE, "ab")
    latents, rows = batch(3)
    counts = []
    for scale in (1.0, 3.0, 1.0):
        denoiser(latents, 300, rows, scale)
        counts.append(denoiser.evaluations)
    assert counts == [3, 9, 12]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_does_not_depend_on_the_batch(adapted_unet, use_dora, scale):
    unet, _ = adapted_unet(use_dora=use_dora)
    latents, rows = batch(4)
    denoiser = Denoiser(unet, SCHEDULE, "ab")
    assert denoiser.single == use_dora
    together = denoiser(latents, 300, rows, scale)
    for i in range(4):
        at = slice(i, i + 1)
        alone = denoiser(latents[at], 300, rows[at], scale)
        torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-4)
    swapped = Rows(rows.prompt_embeds, rows.negative_embeds, rows.weights.flip(0))
    assert (denoiser(latents, 300, swapped, scale) - together).abs().max() > 1e-3


def test_noise_comes_in_the_dtype_of_the_latents(adapted_unet):
    unet, _ = adapted_unet()
    latents, rows = batch(2)
    denoiser = Denoiser(unet, SCHEDULE, "ab")
    single = denoiser(latents, 300, rows, 3.0)
    double = denoiser(latents.double(), 300, rows, 3.0)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-5)
    half = Denoiser(unet.to(torch.bfloat16), SCHEDULE, "ab")(latents, 300, rows)
    assert half.dtype == torch.float32 and (half - single).abs().max() > 1e-4


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_half_of_guidance_looks_at_its_own_half(adapted_unet, use_dora, scale):
    unet, _ = adapted_unet(use_dora=use_dora)
    latents, rows = batch(2)
    plain = Denoiser(unet, SCHEDULE, "ab")(latents, 300, rows, scale)
    shared = SharedAttention(unet, "outer", EVERY)
    denoiser = Denoiser(unet, SCHEDULE, "ab", shared)
    recorded = denoiser(latents, 300, rows, scale, record="new")
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-4)

    def at(left, right, alpha):
        return Between(torch.tensor(left), torch.tensor(right), torch.tensor(alpha, dtype=torch.float64))

    # Frames that are the pictures, at the ends that are the pictures: both halves must find their own.
    found = denoiser(latents, 300, rows, scale, between=at([0, 0], [1, 1], [0.0, 1.0]))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    far = denoiser(latents, 300, rows, scale, between=at([0, 0], [1, 1], [1.0, 0.0]))
    assert (far - plain).abs().max() > 1e-3


def test_recording_in_chunks_equals_recording_at_once_under_guidance(adapted_unet):
    unet, _ = adapted_unet()
    latents, rows = batch(3)
    shared = SharedAttention(unet, "kv", EVERY)
    denoiser = Denoiser(unet, SCHEDULE, "ab", shared)
    lies = Between(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), torch.tensor([0.3, 0.6, 0.9]))
    frames = batch(3, seed=4)[0]
    found = []
    for cuts in ([0, 3], [0, 1, 3], [0, 1, 2, 3], [0, 2, 3]):
        for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            denoiser(latents[a:b], 300, rows[a:b], 3.0, record="more" if i else "new")
        found.append(denoiser(frames, 300, rows, 3.0, between=lies))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    denoiser(latents[:2], 300, rows[:2], 3.0, record="new")
    denoiser(latents[2:], 300, rows[2:], 3.0, record="new")  # instead of "more": the others are forgotten
    assert shared.recorded_rows() == 2


@pytest.mark.parametrize("mode", ["kv", "fused_outer"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pictures_and_frames_in_one_pass_equal_pictures_first(adapted_unet, mode, use_dora, scale):
    unet, _ = adapted_unet(use_dora=use_dora)
    (latents, rows), (frames, under) = batch(3), batch(2, seed=4)
    denoiser = Denoiser(unet, SCHEDULE, "ab", SharedAttention(unet, mode, EVERY))
    lies = Between(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([0.3, 0.6]))
    first = denoiser(latents, 300, rows, scale, record="new")
    apart = torch.cat([first, denoiser(frames, 300, under, scale, between=lies)])
    every, all_rows = torch.cat([latents, frames]), join_rows([rows, under])
    denoiser(frames, 300, under, scale, record="new")  # what was recorded before is forgotten
    together = denoiser(every, 300, all_rows, scale, record="new", between=lies)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    if not use_dora:  # of which all rows come at once
        denoiser(latents[:1], 300, rows[:1], scale, record="new")
        rest = denoiser(every[1:], 300, all_rows[1:], scale, record="more", between=lies)
        torch.testing.assert_close(rest, apart[1:], rtol=1e-4, atol=1e-4)
    other = Between(lies.right, lies.left, lies.alpha)
    swapped = denoiser(every, 300, all_rows, scale, record="new", between=other)
    assert (swapped - apart)[3:].abs().max() > 1e-3
    torch.testing.assert_close(swapped[:3], apart[:3], rtol=1e-4, atol=1e-4)


def test_rows_are_cut_and_joined():
    _, rows = batch(5)
    joined = join_rows([rows[:2], rows[torch.tensor([2])], rows[3:]])
    assert len(joined) == 5
    for name in ("prompt_embeds", "negative_embeds", "weights"):
        assert torch.equal(getattr(joined, name), getattr(rows, name))
