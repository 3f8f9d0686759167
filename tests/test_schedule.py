"""The forward process against the known equations and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from lorakit.schedule import NoiseSchedule

SD15 = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(DDIMScheduler(**SD15), prediction_type)


def sample(seed: int):
    rng = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=rng)
    return latents, noise, torch.randint(0, 1000, (4,), generator=rng)


@pytest.mark.parametrize(
    "config", [SD15, SD15 | {"beta_schedule": "linear"}, SD15 | {"rescale_betas_zero_snr": True}]
)
def test_alpha_bar_and_noising_equal_diffusers(config):
    theirs = DDIMScheduler(**config)
    ours = NoiseSchedule.from_scheduler(theirs)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-6)
    latents, noise, timesteps = sample(0)
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps),
        theirs.add_noise(latents, noise, timesteps),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDPMScheduler])
def test_schedule_does_not_depend_on_the_sampler_that_a_base_ships(scheduler):
    assert torch.equal(NoiseSchedule.from_scheduler(scheduler(**SD15)).alpha_bar, schedule().alpha_bar)


def test_velocity_equals_diffusers():
    latents, noise, timesteps = sample(1)
    theirs = DDPMScheduler(**SD15).get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(
        schedule("v_prediction").target(latents, noise, timesteps), theirs, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_signal_and_noise_follow_from_x_t_and_velocity(seed):
    """x_0 = sqrt(a) x_t - sqrt(1-a) v, eps = sqrt(1-a) x_t + sqrt(a) v (Salimans & Ho 2022, appendix D)."""
    latents, noise, timesteps = sample(seed)
    s = schedule("v_prediction")
    a = s.alpha_bar[timesteps].view(-1, 1, 1, 1).float()
    x_t, v = s.add_noise(latents, noise, timesteps), s.target(latents, noise, timesteps)
    torch.testing.assert_close(a.sqrt() * x_t - (1 - a).sqrt() * v, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((1 - a).sqrt() * x_t + a.sqrt() * v, noise, rtol=1e-4, atol=1e-5)


def test_targets_of_the_three_parameterisations_differ():
    latents, noise, timesteps = sample(2)
    assert torch.equal(schedule("epsilon").target(latents, noise, timesteps), noise)
    assert torch.equal(schedule("sample").target(latents, noise, timesteps), latents)
    assert not torch.allclose(schedule("v_prediction").target(latents, noise, timesteps), noise, atol=0.1)


def test_snr_falls_with_the_timestep_and_equals_diffusers():
    from diffusers.training_utils import compute_snr

    timesteps = torch.arange(1000)
    snr = schedule().snr(timesteps)
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(
        snr.float(), compute_snr(DDPMScheduler(**SD15), timesteps), rtol=1e-4, atol=1e-6
    )
