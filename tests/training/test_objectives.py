"""The denoising loss against hand-made models."""

import pytest
import torch
from diffusers import DDIMScheduler

from lorakit.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule
from lorakit.training.objectives import OBJECTIVES, Batch, denoise, min_snr_weight


def make_batch(seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=rng)
    return Batch(latents, noise, torch.tensor([10, 500, 990]), torch.zeros(3, 5, 16), None)


def student(answer):
    def call(x_t, timesteps, encoder_hidden_states, return_dict):
        return (answer,)

    return call


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_its_square(prediction_type):
    schedule, batch = NoiseSchedule.from_scheduler(DDIMScheduler(), prediction_type), make_batch()
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    assert denoise(student(target), batch, schedule, batch.prompt_embeds).abs().max() == 0
    loss = denoise(student(target + 0.5), batch, schedule, batch.prompt_embeds)
    torch.testing.assert_close(loss, torch.full((3,), 0.25), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_those_of_the_loss_on_x0(prediction_type):
    """weight x (loss in the model's parameterisation) = min(SNR, gamma) x (loss on x_0), for any error."""
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(), prediction_type)
    batch, gamma = make_batch(), 5.0
    timesteps = batch.timesteps
    x_t = schedule.add_noise(batch.latents, batch.noise, timesteps)
    a = schedule.alpha_bar[timesteps].view(-1, 1, 1, 1)
    error = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * 0.1
    target = schedule.target(batch.latents, batch.noise, timesteps)
    prediction = (target + error).double()
    x0 = {
        "epsilon": (x_t.double() - (1 - a).sqrt() * prediction) / a.sqrt(),
        "v_prediction": a.sqrt() * x_t.double() - (1 - a).sqrt() * prediction,
        "sample": prediction,
    }[prediction_type]
    loss_on_x0 = ((x0 - batch.latents.double()) ** 2).mean(dim=(1, 2, 3))
    weighted = denoise(student(target + error), batch, schedule, batch.prompt_embeds, snr_gamma=gamma)
    expected = schedule.snr(timesteps).clamp(max=gamma) * loss_on_x0
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-3, atol=1e-6)


def test_min_snr_leaves_low_snr_alone_and_cuts_high_snr():
    weights = min_snr_weight(torch.tensor([0.01, 1.0, 50.0]), 5.0, "epsilon")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.1]))


def test_the_student_sees_the_noised_latents_and_the_prompt():
    seen = {}

    def spy(x_t, timesteps, encoder_hidden_states, return_dict):
        seen.update(x_t=x_t, timesteps=timesteps, embeds=encoder_hidden_states)
        return (torch.zeros_like(x_t),)

    schedule, batch = NoiseSchedule.from_scheduler(DDIMScheduler()), make_batch()
    denoise(spy, batch, schedule, batch.prompt_embeds)
    torch.testing.assert_close(seen["x_t"], schedule.add_noise(batch.latents, batch.noise, batch.timesteps))
    assert torch.equal(seen["timesteps"], batch.timesteps)
    assert seen["embeds"] is batch.prompt_embeds


def test_every_objective_that_the_config_offers_exists():
    from train_lora import TrainConfig

    offered = TrainConfig.model_json_schema()["properties"]["objective"]
    assert {offered["const"]} if "const" in offered else set(offered["enum"]) == set(OBJECTIVES)
