"""The forward process against the known equations and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from lorakit.diffusion.schedule import NoiseSchedule, ddim_step
from lorakit.ground.errors import UserError

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


# ---- DDIM ----


def theirs(steps: int, prediction_type: str = "epsilon") -> DDIMScheduler:
    scheduler = DDIMScheduler(
        **SD15,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_the_grid_equals_that_of_diffusers(steps):
    scheduler, grid = theirs(steps), schedule().grid(steps)
    assert list(grid.timesteps) == scheduler.timesteps.tolist() and len(grid) == steps
    before = [t - 1000 // steps for t in grid.timesteps]
    levels = [scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod for t in before]
    torch.testing.assert_close(
        torch.tensor(grid.alpha_bar[1:]),
        torch.tensor(levels).double(),
        rtol=1e-5,
        atol=1e-6,
        check_dtype=False,
    )
    assert grid.alpha_bar[-1] == float(schedule().alpha_bar[0]) != 1.0  # set_alpha_to_one would end at 1


def test_pndm_as_sd_15_ships_it_has_another_grid():
    scheduler = PNDMScheduler(**SD15, skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() != list(schedule().grid(50).timesteps)
    assert len(scheduler.timesteps) == 51


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_step_equals_that_of_diffusers(prediction_type, steps):
    scheduler, ours = theirs(steps, prediction_type), schedule(prediction_type)
    grid = ours.grid(steps)
    latents, output, _ = sample(3)
    for i, t in enumerate(grid.timesteps):
        epsilon = ours.epsilon(output, latents, t)
        step = ddim_step(latents, epsilon, grid.alpha_bar[i], grid.alpha_bar[i + 1])
        wanted = scheduler.step(output, t, latents).prev_sample
        torch.testing.assert_close(step, wanted, rtol=1e-4, atol=1e-4)
        shifted = ddim_step(latents, epsilon, grid.alpha_bar[i], 1.0)  # set_alpha_to_one, at the wrong node
        assert (shifted - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_step_is_undone_by_the_step_back_along_the_same_noise(steps):
    grid = schedule().grid(steps)
    latents, epsilon = (x.double() for x in sample(4)[:2])
    for a, b in zip(grid.alpha_bar[:-1], grid.alpha_bar[1:], strict=True):
        there = ddim_step(latents, epsilon, a, b)
        torch.testing.assert_close(ddim_step(there, epsilon, b, a), latents, rtol=0, atol=1e-12)
        assert (ddim_step(there, 1.01 * epsilon, b, a) - latents).abs().max() > 1e-5  # along other noise


@pytest.mark.parametrize("timestep", [1, 300, 981])
def test_noise_is_found_in_every_parameterisation(timestep):
    latents, noise, _ = (x.double() if x.is_floating_point() else x for x in sample(5))
    at = torch.full((4,), timestep)
    noisy = schedule().add_noise(latents, noise, at)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        s = schedule(prediction_type)
        torch.testing.assert_close(
            s.epsilon(s.target(latents, noise, at), noisy, timestep), noise, rtol=1e-9, atol=1e-9
        )
    wrong = schedule("epsilon").epsilon(schedule("v_prediction").target(latents, noise, at), noisy, timestep)
    assert (wrong - noise).abs().max() > 1e-2


@pytest.mark.parametrize(("steps", "stride"), [(50, 5), (50, 3), (7, 2), (20, 20), (20, 1)])
def test_a_coarse_grid_passes_nodes_of_the_fine_one(steps, stride):
    grid = schedule().grid(steps)
    coarse = grid.coarse(stride)
    assert coarse.timesteps == grid.timesteps[::stride]
    assert coarse.alpha_bar == tuple(grid.alpha_bar[i] for i in grid.nodes(stride))
    assert coarse.alpha_bar[0] == grid.alpha_bar[0] and coarse.alpha_bar[-1] == grid.alpha_bar[-1]
    assert grid.nodes(stride) == sorted(set(grid.nodes(stride))) and len(coarse.alpha_bar) == len(coarse) + 1


@pytest.mark.parametrize("steps", [0, -3, 1000, 5000])
def test_a_count_of_steps_that_the_schedule_has_not_is_refused(steps):
    with pytest.raises(UserError, match="takes 1 to 999"):
        schedule().grid(steps)
    assert len(schedule().grid(999)) == 999
