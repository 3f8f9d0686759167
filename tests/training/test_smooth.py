"""Smooth Diffusion: rates by hand, gradients by differences, the running mean, whole runs."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from harness import sha
from runs import config_of, steps_of, train_run
from safetensors.torch import load_file

from lorakit.diffusion.lora import add_lora
from lorakit.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule
from lorakit.ground.errors import UserError
from lorakit.training.batch import Batch
from lorakit.training.objectives import Models, Objective, Pass, as_function
from lorakit.training.smooth import Smooth, rates
from lorakit.training.smooth_config import SmoothSettings


def make_batch(count: int = 3, dtype=torch.float32) -> Batch:
    rng = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=rng).to(dtype)
    keys = tuple((7, position) for position in range(count))
    embeds = torch.randn(count, 5, 16, generator=rng).to(dtype)
    return Batch(latents, noise, torch.tensor([10, 500, 990, 300])[:count], embeds, None, keys)


def term_of(objective=("denoise", "smooth"), **settings) -> Smooth:
    own = {"every": 1} | settings
    return Smooth(SimpleNamespace(objective=objective, smooth=SmoothSettings(**own)))


def models_of(student, prediction_type="epsilon") -> Models:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(), prediction_type)
    return Models(student, student, lambda prompts: torch.zeros(len(prompts), 5, 16), schedule)


def pass_of(models: Models, batch: Batch) -> Pass:
    return Pass(models, batch, batch.prompt_embeds, noise_gradient=True)


# ---- the rate ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_rate_of_a_linear_model_and_its_gradient_are_those_on_paper(prediction_type):
    scale = torch.tensor(0.3, requires_grad=True)
    models, batch = models_of(lambda x_t, *_: scale * x_t, prediction_type), make_batch()
    rate = rates(models, pass_of(models, batch), create_graph=True)
    (slope,) = torch.autograd.grad(rate.sum(), scale)
    a = models.schedule.alpha_bar[batch.timesteps]
    signal, sigma, norm = a.sqrt(), (1 - a).sqrt(), batch.normal("smooth direction").flatten(1).norm(dim=1)
    length = sigma * norm / math.sqrt(4 * 8 * 8)  # of y
    share, by_scale = {  # d x_0 / d x_t, and its derivative by the scale
        "epsilon": ((1 - sigma * 0.3) / signal, -sigma / signal),
        "v_prediction": (signal - sigma * 0.3, -sigma),
        "sample": (torch.full_like(sigma, 0.3), torch.ones_like(sigma)),
    }[prediction_type]
    torch.testing.assert_close(rate.double(), share.abs() * sigma * length, rtol=1e-4, atol=1e-6)
    wanted = (share.sign() * by_scale * sigma * length).sum()
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.fixture
def adapted(tiny_unet):
    """A tiny U-Net in float64 with a LoRA that changes something, and the LoRA's parameters."""
    unet = tiny_unet().double()
    parameters = add_lora(unet, rank=2, alpha=2.0, targets="all")
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.1
    return unet, parameters


def test_the_rate_of_a_u_net_is_that_of_a_jacobian_vector_product_by_differences(adapted):
    """For u = J^T y / r, y^T J u = r; and J u is a difference of two passes."""
    unet, _ = adapted
    models, batch = models_of(as_function(unet)), make_batch(dtype=torch.float64)
    schedule, t = models.schedule, batch.timesteps
    at = pass_of(models, batch)
    y = batch.normal("smooth direction").double() * schedule.at(t, batch.latents)[1] / math.sqrt(4 * 8 * 8)
    x_0, _ = schedule.predicted(at.prediction, at.x_t, t)
    (pulled,) = torch.autograd.grad((x_0 * y).sum(), at.noise)
    rate = pulled.flatten(1).norm(dim=1)
    u, h = pulled / rate.view(-1, 1, 1, 1), 1e-4

    def clean(noise):
        x_t = schedule.add_noise(batch.latents, noise, t)
        output = as_function(unet)(x_t, t, batch.prompt_embeds)
        return schedule.predicted(output, x_t, t)[0]

    with torch.no_grad():
        moved = (clean(batch.noise + h * u) - clean(batch.noise - h * u)) / (2 * h)
    torch.testing.assert_close((y * moved).sum(dim=(1, 2, 3)), rate, rtol=1e-6, atol=0)
    found = rates(models, pass_of(models, batch), create_graph=False)
    torch.testing.assert_close(found.double(), rate, rtol=1e-4, atol=0)


def test_the_second_derivative_reaches_the_lora_as_differences_say(adapted):
    unet, parameters = adapted
    models, batch, term = models_of(as_function(unet)), make_batch(dtype=torch.float64), term_of()
    term.finish_step({"rate": 0.1, "measured": 1.0})
    objective = Objective({"smooth": term}, noise_gradient=True)
    with objective.attention():
        loss, _ = objective.loss(models, batch, batch.prompt_embeds)
        loss.backward()
    h, checked = 1e-3, 0
    for parameter in parameters[:: len(parameters) // 5]:
        place = int(parameter.grad.abs().argmax())
        flat, slope = parameter.data.view(-1), float(parameter.grad.view(-1)[place])
        sides = []
        for sign in (1, -1):
            flat[place] += sign * h
            sides.append(objective.loss(models, batch, batch.prompt_embeds)[0].item())
            flat[place] -= sign * h
        assert slope == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-2, abs=1e-7)
        checked += abs(slope) > 1e-6
    assert checked >= 3
    assert batch.noise.grad is None and not batch.noise.requires_grad


# ---- the running mean ----


def test_the_mean_is_the_first_rate_at_first_and_moves_once_a_step():
    term = term_of(decay=0.1)
    assert term.usual is None
    term.finish_step({"rate": 1.5, "measured": 0.5})
    assert term.usual == pytest.approx(3.0)  # no start at 0
    term.finish_step({"rate": 5.0, "measured": 1.0})
    assert term.usual == pytest.approx((0.9 * 3 + 5) / 1.9)
    again = term_of(decay=0.1)
    again.load_state_dict(term.state_dict())
    assert again.usual == term.usual
    again.finish_step({"rate": 4.0, "measured": 1.0})
    assert again.usual != term.usual


def test_the_first_step_costs_nothing_and_no_pass_moves_the_mean():
    scale = torch.tensor(0.3, requires_grad=True)
    models, batch, term = models_of(lambda x_t, *_: scale * x_t), make_batch(), term_of()
    loss, parts = term.loss(models, pass_of(models, batch))
    (slope,) = torch.autograd.grad(loss.sum(), scale)
    assert loss.abs().max() == 0 and slope == 0 and (parts["rate"] > 0).all()
    assert term.state_dict() == {"mean": 0.0, "steps": 0}
    term.finish_step({"rate": 0.0, "measured": 1.0})
    assert (term.loss(models, pass_of(models, batch))[0] == parts["rate"] ** 2).all()


@torch.no_grad()
def test_alone_it_judges_without_gradient_and_beside_another_it_does_not():
    models, batch = models_of(lambda x_t, *_: 0.3 * x_t), make_batch()
    alone, beside = term_of("smooth"), term_of()
    alone.finish_step({"rate": 0.5, "measured": 1.0})
    at = Pass(models, batch, batch.prompt_embeds)
    found, wanted = alone.validation(models, at), rates_of(models, batch)
    torch.testing.assert_close(found, (wanted - 0.5) ** 2)
    assert not found.requires_grad and beside.validation(models, at) is None


def rates_of(models, batch):
    with torch.enable_grad():
        return rates(models, pass_of(models, batch), create_graph=False).detach()


def test_every_second_sample_carries_it_and_the_others_cost_what_they_always_do():
    """A step of two halves: rates of both kinds of rows agree with a pass of all, and the other is apart."""
    calls, batch = [], make_batch(4)

    def student(x_t, *_):
        calls.append((len(x_t), x_t.requires_grad))
        return 0.3 * x_t

    models, whole, half = models_of(student), term_of(), term_of(every=2)
    for term in (whole, half):
        term.finish_step({"rate": 0.5, "measured": 1.0})
    every, parts = whole.loss(models, pass_of(models, batch))
    assert calls == [(4, True)]
    at = Pass(models, batch, batch.prompt_embeds, noise_gradient=True, noise_every=2)
    torch.testing.assert_close(at.prediction, 0.3 * at.x_t)
    assert calls[1:] == [(2, True), (2, False)]
    second, halves = half.loss(models, at)
    torch.testing.assert_close(second[::2], 2 * every[::2])
    assert (second[1::2] == 0).all() and halves["measured"].tolist() == [1, 0, 1, 0]
    assert torch.equal(halves["rate"][::2], parts["rate"][::2])


def test_a_step_without_such_a_sample_moves_nothing():
    scale, batch = torch.tensor(0.3, requires_grad=True), make_batch(2)
    batch = Batch(batch.latents, batch.noise, batch.timesteps, batch.prompt_embeds, None, ((7, 1), (7, 3)))
    models, term = models_of(lambda x_t, *_: scale * x_t), term_of("smooth", every=2)
    at = Pass(models, batch, batch.prompt_embeds, noise_gradient=True, noise_every=2)
    loss, parts = term.loss(models, at)
    (slope,) = torch.autograd.grad(loss.sum(), scale)
    assert loss.abs().max() == 0 and slope == 0
    term.finish_step({name: float(part.mean()) for name, part in parts.items()})
    assert term.usual is None


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("torch_compile=true", "torch_compile"),
        ("mixed_precision=fp16", "mixed_precision"),
        ("enable_xformers_memory_efficient_attention=true", "enable_xformers"),
        ("smooth.weight=0", "smooth.weight"),
    ],
)
@pytest.mark.parametrize("objective", ["smooth", '["denoise","smooth"]'])
def test_what_cannot_be_differentiated_twice_is_refused(objective, setting, told):
    words = ["data_dir=x", "n_epochs=1", f"objective={objective}"]
    assert config_of(words)
    with pytest.raises(UserError, match=told):
        config_of([*words, setting])


# ---- whole runs, all three together ----


def arguments(settings, tmp_path, name: str, **changes) -> list[str]:
    own = {"objective": ["denoise", "smooth", "prior"], "prior": {"prompts": ["a red house", "a lake"]}}
    return settings(**(own | {"output_dir": str(tmp_path / name)} | changes))


@pytest.mark.slow
def test_three_together_resume_exactly_and_a_state_left_out_is_seen(settings, tmp_path, monkeypatch):
    [straight] = train_run(arguments(settings, tmp_path, "straight", smooth={"weight": 30.0}))
    [resumed] = train_run(arguments(settings, tmp_path, "resumed", smooth={"weight": 30.0}), stop=3)
    assert sha(straight) == sha(resumed)
    record = steps_of(straight.with_suffix(""))[-1]
    assert {"loss/denoise", "loss/smooth", "loss/smooth.rate", "loss/prior"} <= record.keys()
    monkeypatch.setattr(Smooth, "load_state_dict", lambda self, state: None)
    [forgetful] = train_run(arguments(settings, tmp_path, "forgetful", smooth={"weight": 30.0}), stop=3)
    assert sha(forgetful) != sha(straight)


@pytest.mark.slow
def test_three_together_do_not_depend_on_how_a_step_is_split(settings, tmp_path):
    # An epsilon with which AdamW does not blow up the rounding of gradients that are nearly 0.
    common = {"max_train_steps": 3, "adam_epsilon": 1e-2, "validation_steps": 0}
    [whole] = train_run(arguments(settings, tmp_path, "whole", train_batch_size=4, **common))
    [parts] = train_run(arguments(settings, tmp_path, "parts", total_batch_size=4, **common))
    first, second = load_file(whole), load_file(parts)
    assert max(float((first[k] - second[k]).abs().max() / first[k].abs().max()) for k in first) < 1e-5
