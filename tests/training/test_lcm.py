"""Consistency distillation: its solver, boundary and loss against known answers, then whole runs of it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import nn

from lorakit.diffusion import lora
from lorakit.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule
from lorakit.training.batch import Batch
from lorakit.training.lcm import TEACHER_STEPS, Lcm, boundary, consistent, guided_step, nodes
from lorakit.training.lcm_config import LcmSettings
from lorakit.training.objectives import Models, Objective, Pass

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def schedule_of(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(DDIMScheduler(**BETAS), prediction_type)


def make_batch(count: int = 4, seed: int = 0) -> Batch:
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.tensor([3, 19, 510, 999, 700, 250])[:count]
    return Batch(
        latents, noise, timesteps, torch.ones(count, 5, 16), None, tuple((7, k) for k in range(count))
    )


def term(**settings) -> Lcm:
    return Lcm(SimpleNamespace(lcm=LcmSettings(**settings)))


def field(x_t, timesteps, prompt_embeds):
    """A U-Net that depends on all of its arguments."""
    scale = 1 + 0.3 * torch.sin(timesteps.float() / 200).view(-1, 1, 1, 1)
    return torch.tanh(scale * x_t + prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1))


def models_of(student=field, teacher=field, schedule=None) -> Models:
    return Models(
        student, teacher, lambda prompts: torch.zeros(len(prompts), 5, 16), schedule or schedule_of()
    )


# ---- the solver ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_step_of_the_teacher_is_a_step_of_diffusers_ddim_at_that_guidance(prediction_type):
    models, batch, g = models_of(schedule=schedule_of(prediction_type)), make_batch(), 3.0
    t, s = nodes(batch.timesteps, models.schedule, 50)
    assert t.tolist() == [19, 19, 519, 999] and s.tolist() == [0, 0, 499, 979]
    ours = guided_step(models, batch.latents, t, s, batch.prompt_embeds, torch.full((4,), g))
    library = DDIMScheduler(**BETAS, prediction_type=prediction_type, set_alpha_to_one=False)
    library.set_timesteps(50)  # it steps by 20, and from 19 to the clean end
    for row in range(4):
        x, one = batch.latents[row : row + 1], t[row : row + 1]
        with_prompt, without = (
            field(x, one, embeds) for embeds in (batch.prompt_embeds[:1], torch.zeros(1, 5, 16))
        )
        output = without + g * (with_prompt - without)
        theirs = library.step(output, int(one), x).prev_sample
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=2e-5, atol=2e-5)
        plain = library.step(with_prompt, int(one), x).prev_sample
        assert not torch.allclose(ours[row : row + 1], plain, atol=1e-3)


def test_the_nodes_are_the_timesteps_that_the_sampler_evaluates():
    schedule = schedule_of()
    found, after = nodes(torch.arange(1000), schedule, 50)
    assert found.unique().tolist() == list(range(19, 1000, 20)) and set(torch.bincount(found).tolist()) == {
        0,
        20,
    }
    assert after.unique().tolist() == [0, *range(19, 980, 20)]
    for steps in (1, 2, 4, 8, 50):
        sampler = LCMScheduler(**BETAS)
        sampler.set_timesteps(steps, original_inference_steps=50)
        assert set(sampler.timesteps.tolist()) <= set(found.tolist())
        assert not set(sampler.timesteps.tolist()) & set(range(0, 1000, 20))


def test_at_guidance_1_the_teacher_sees_the_prompt_alone():
    rows = []

    def teacher(x_t, timesteps, prompt_embeds):
        rows.append(len(x_t))
        return field(x_t, timesteps, prompt_embeds)

    batch, models = make_batch(), models_of(teacher=teacher)
    t, s = nodes(batch.timesteps, models.schedule, 50)
    step = [
        guided_step(models, batch.latents, t, s, batch.prompt_embeds, torch.full((4,), g)) for g in (1.0, 2.0)
    ]
    assert rows == [4, 8] and not torch.allclose(*step)


# ---- the boundary ----


def test_at_timestep_0_the_picture_is_its_own_end_and_far_from_it_the_output_decides():
    c_skip, c_out = boundary(torch.tensor([0, 19, 999]), torch.zeros(3, 4, 8, 8))
    assert c_skip.shape == (3, 1, 1, 1) and c_skip[0] == 1 and c_out[0] == 0
    torch.testing.assert_close(c_skip[1:].flatten(), torch.tensor([6.925e-6, 2.505e-9]), rtol=1e-3, atol=0)
    torch.testing.assert_close(c_out[1:].flatten(), torch.ones(2), rtol=1e-5, atol=0)
    library = LCMScheduler(**BETAS)
    for row, timestep in enumerate((0, 19, 999)):
        theirs = library.get_scalings_for_boundary_condition_discrete(torch.tensor(float(timestep)))
        torch.testing.assert_close(torch.stack([c_skip[row], c_out[row]]).flatten(), torch.stack(theirs))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_true_output_tells_the_picture_at_every_timestep(prediction_type):
    schedule, batch = schedule_of(prediction_type), make_batch()
    x_t = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    output = schedule.target(batch.latents, batch.noise, batch.timesteps)
    x_0, epsilon = schedule.predicted(output, x_t, batch.timesteps)
    torch.testing.assert_close(x_0, batch.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        epsilon, batch.noise, rtol=1e-4, atol=2e-3 if "sample" in prediction_type else 1e-4
    )
    found = consistent(schedule, output, x_t, batch.timesteps)
    torch.testing.assert_close(found, batch.latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(consistent(schedule, output, x_t, torch.zeros(4, dtype=torch.int64)), x_t)


# ---- the loss ----


def test_the_loss_is_the_pseudo_huber_distance_of_two_ends():
    lcm, batch, models = term(guidance_scale=3.0, huber=0.1), make_batch(), models_of()
    at = Pass(models, batch, batch.prompt_embeds)
    loss, parts = lcm.loss(models, at)
    t, s = nodes(batch.timesteps, models.schedule, 50)
    x_t = models.schedule.add_noise(batch.latents, batch.noise, t)
    x_s = guided_step(models, x_t, t, s, batch.prompt_embeds, torch.full((4,), 3.0))
    ends = [
        consistent(models.schedule, field(x, at_, batch.prompt_embeds), x, at_)
        for x, at_ in ((x_t, t), (x_s, s))
    ]
    d = ends[0] - ends[1]
    torch.testing.assert_close(loss, ((d**2 + 0.01).sqrt() - 0.1).mean(dim=(1, 2, 3)))
    assert loss.shape == (4,) and parts == {}
    assert (loss < d.abs().mean(dim=(1, 2, 3))).all()  # below the absolute, and near it for a small c
    small = term(guidance_scale=3.0, huber=1e-6).loss(models, at)[0]
    torch.testing.assert_close(small, d.abs().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_a_student_that_tells_the_end_from_everywhere_costs_nothing():
    """Its x_0 is one picture, whatever it sees; another one for each noise level costs."""
    schedule, batch = schedule_of(), make_batch()
    picture = torch.full((4, 4, 8, 8), 0.3)

    def knowing(x_t, timesteps, prompt_embeds, drift=0.0):
        t = timesteps.long()
        signal, sigma = schedule.at(t, x_t)
        return (x_t - signal * (picture + drift * t.view(-1, 1, 1, 1) / 1000)) / sigma

    at = Pass(models_of(), batch, batch.prompt_embeds)
    far = batch.timesteps >= 20  # nearer, the next node is the picture itself
    loss = term().loss(models_of(student=knowing), at)[0]
    assert loss[far].max() < 1e-5
    drifting = models_of(student=lambda *args: knowing(*args, drift=1.0))
    assert term().loss(drifting, at)[0][far].min() > 1e-3


def test_only_the_end_that_is_told_at_t_has_a_gradient():
    scale, calls = nn.Parameter(torch.ones(())), []

    def student(x_t, timesteps, prompt_embeds):
        calls.append((torch.is_grad_enabled(), timesteps.tolist()))
        return scale * field(x_t, timesteps, prompt_embeds)

    batch, models = make_batch(), models_of(student=student)
    loss, _ = Objective({"lcm": term()}).loss(models, batch, batch.prompt_embeds)
    loss.backward()
    assert calls == [(False, [0, 0, 499, 979]), (True, [19, 19, 519, 999])]
    assert scale.grad is not None and scale.grad != 0


def test_guidance_is_drawn_for_each_sample_or_fixed():
    batch, models = make_batch(6), models_of()
    at = Pass(models, batch, batch.prompt_embeds)
    drawn = term(guidance_scale=(2.0, 5.0)).guidance(at)
    assert len(set(drawn.tolist())) == 6 and drawn.min() >= 2 and drawn.max() < 5
    rest = Batch(batch.latents[2:], batch.noise[2:], batch.timesteps[2:], None, None, batch.keys[2:])
    again = term(guidance_scale=(2.0, 5.0)).guidance(Pass(models, rest, batch.prompt_embeds[2:]))
    assert torch.equal(drawn[2:], again)
    assert term(guidance_scale=4.0).guidance(at).tolist() == [4.0] * 6
    assert term().guidance(at).tolist() == [8.5] * 6  # the report's w of 7.5


# ---- validation ----


def test_validation_compares_one_step_from_noise_with_where_the_teacher_arrives():
    batch, lcm = make_batch(2), term(guidance_scale=3.0)
    evaluated = []

    def teacher(x_t, timesteps, prompt_embeds):
        evaluated.append(timesteps.tolist())
        return field(x_t, timesteps, prompt_embeds)

    models = models_of(teacher=teacher)
    at = Pass(models, batch, batch.prompt_embeds)
    first = lcm.validation(models, at)
    assert len(evaluated) == TEACHER_STEPS and evaluated[0] == [999] * 4 and evaluated[-1] == [39] * 4
    assert torch.equal(lcm.validation(models, at), first) and len(evaluated) == TEACHER_STEPS  # made once
    ends = lcm.teacher_ends(models, batch.noise, batch.prompt_embeds)
    schedule = models.schedule

    def arrived(x_t, timesteps, prompt_embeds):
        signal, sigma = schedule.at(timesteps, x_t)
        return (x_t - signal * ends) / sigma

    assert lcm.validation(models_of(student=arrived), at).max() < 1e-4 < 1e-2 < first.min()
    other = Batch(batch.latents, batch.noise, batch.timesteps, None, None, ((7, 8), (7, 9)))
    lcm.validation(models, Pass(models, other, batch.prompt_embeds))
    assert len(evaluated) == 3 * TEACHER_STEPS


def test_the_teachers_path_is_that_of_diffusers_ddim_in_as_many_steps():
    batch, models = make_batch(2), models_of()
    library = DDIMScheduler(**BETAS, set_alpha_to_one=False, timestep_spacing="trailing")
    library.set_timesteps(TEACHER_STEPS)
    x = batch.noise
    for timestep in library.timesteps:
        rows = torch.full((2,), int(timestep))
        with_prompt, without = (
            field(x, rows, embeds) for embeds in (batch.prompt_embeds, torch.zeros(2, 5, 16))
        )
        x = library.step(without + 3 * (with_prompt - without), int(timestep), x).prev_sample
    ours = term(guidance_scale=3.0).teacher_ends(models, batch.noise, batch.prompt_embeds)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


# ---- the teacher in live models ----


def test_the_teacher_is_the_base_to_the_bit_and_its_own_loras_are_in_it_alone(tiny_unet, random_lora):
    base, unet = tiny_unet(0), tiny_unet(0)
    style = random_lora(base, 5)
    lora.load_lora(style, unet, adapter_name="teacher_0", weight=0.7)
    params = lora.add_lora(unet, rank=4, alpha=4, targets="attention", seed=1)
    with torch.no_grad():
        for param in params:
            param.add_(0.1)
    styled = tiny_unet(0)
    lora.load_lora(style, styled, adapter_name="style", weight=0.7)
    config = base.config
    x = torch.randn(1, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = x, torch.tensor([500]), torch.ones(1, 5, config.cross_attention_dim)

    @torch.no_grad()
    def told(model):
        return model(*inputs).sample

    with lora.only_adapters(unet, ()):
        assert torch.equal(told(unet), told(base))
    with lora.only_adapters(unet, ["teacher_0"]):
        assert torch.equal(told(unet), told(styled))
    assert not torch.allclose(told(styled), told(base), atol=1e-3)
    student = told(unet)
    assert not torch.allclose(student, told(base), atol=1e-3)
    plain = tiny_unet(0)
    lora.add_lora(plain, rank=4, alpha=4, targets="attention", seed=1)
    for mine, theirs in zip(params, (p for p in plain.parameters() if p.requires_grad), strict=True):
        theirs.data.copy_(mine.data)
    assert torch.equal(student, told(plain))  # the teacher's LoRA takes no part in the student
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in params}
