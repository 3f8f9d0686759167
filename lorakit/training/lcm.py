"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, algorithm 1; as LoRA, 2311.05556).

The student learns to tell the end of the teacher's path from any point of it, in one evaluation: what it says
at t is drawn to what it says itself at s, one DDIM step of the guided teacher nearer to the picture. There is
no averaged target network, as in the LoRA report, and the guidance is not told to the U-Net: it is learnt.
"""

from typing import Any

import torch
from torch import Tensor

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.training.batch import SampleKey
from lorakit.training.lcm_config import lcm_settings
from lorakit.training.objectives import Models, Pass, Term

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # the paper's, and LCMScheduler's
TEACHER_STEPS = 25  # of the teacher's path that validation compares with


def boundary(timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (sec. 4.1), shaped to multiply `like`: 1 and 0 at t = 0, in the picture."""
    t = timesteps.to(like).view(-1, *[1] * (like.ndim - 1)) * TIMESTEP_SCALING
    total = t**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, t / total.sqrt()


def consistent(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x_0: the end of the path, as the output of the U-Net tells it."""
    c_skip, c_out = boundary(timesteps, x_t)
    return c_skip * x_t + c_out * schedule.predicted(output.float(), x_t, timesteps)[0]


def nodes(timesteps: Tensor, schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """The node of a solver of `steps` that each of `timesteps` (B,) falls to, and the next one; both (B,)."""
    stride = schedule.num_timesteps // steps
    t = (timesteps // stride + 1) * stride - 1
    return t, (t - stride).clamp(min=0)


def guided_step(
    models: Models, x_t: Tensor, timesteps: Tensor, to: Tensor, prompt_embeds: Tensor, guidance: Tensor
) -> Tensor:
    """One DDIM step of the teacher from `timesteps` to `to` (B,), under u + g (c - u) of its outputs.

    Args:
        guidance: (B,); the paper's w + 1. At 1 throughout, the half without prompt is not evaluated.
    """
    on_device = timesteps.to(x_t.device)
    if bool((guidance == 1).all()):
        output = models.teacher(x_t, on_device, prompt_embeds).float()
    else:
        blank = models.embed([""]).to(prompt_embeds).expand_as(prompt_embeds)
        rows = [torch.cat(each) for each in ((x_t, x_t), (on_device, on_device), (prompt_embeds, blank))]
        with_prompt, without = models.teacher(*rows).float().chunk(2)
        g = guidance.to(x_t).view(-1, 1, 1, 1)
        output = without + g * (with_prompt - without)
    x_0, epsilon = models.schedule.predicted(output, x_t, timesteps)
    return models.schedule.add_noise(x_0, epsilon, to)


class Lcm(Term):
    """Pseudo-Huber distance of the student's ends of the teacher's path, told at t and one step later."""

    def __init__(self, cfg: Any):
        settings = lcm_settings(cfg)
        self.lowest, self.highest = settings.guidance
        self.solver_steps, self.huber = settings.solver_steps, settings.huber
        self.ends: dict[SampleKey, Tensor] = {}  # of the teacher's paths that validation compares with

    def guidance(self, at: Pass) -> Tensor:
        """(B,)"""
        draws = torch.tensor(at.batch.uniform("lcm guidance"))
        return self.lowest + (self.highest - self.lowest) * draws

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        batch, schedule, embeds = at.batch, models.schedule, at.prompt_embeds
        t, s = nodes(batch.timesteps, schedule, self.solver_steps)
        x_t = schedule.add_noise(batch.latents, batch.noise, t)
        with torch.no_grad():  # first, while nothing is kept for backward
            x_s = guided_step(models, x_t, t, s, embeds, self.guidance(at))
            target = consistent(schedule, models.student(x_s, s.to(x_s.device), embeds), x_s, s)
        found = consistent(schedule, models.student(x_t, t.to(x_t.device), embeds), x_t, t)
        distance = ((found - target) ** 2 + self.huber**2).sqrt() - self.huber  # (B, C, h, w)
        return distance.mean(dim=(1, 2, 3)), {}

    def validation(self, models: Models, at: Pass) -> Tensor:
        """Squared distance of one step from noise to where the teacher arrives in TEACHER_STEPS, (B,).

        The loss itself judges nothing: it compares the student with itself.
        """
        missing = [row for row, key in enumerate(at.batch.keys) if key not in self.ends]
        if missing:
            ends = self.teacher_ends(models, at.batch.noise[missing], at.prompt_embeds[missing])
            for row, end in zip(missing, ends.cpu(), strict=True):
                self.ends[at.batch.keys[row]] = end
        noise = at.batch.noise
        timesteps = torch.full((len(noise),), models.schedule.num_timesteps - 1)
        output = models.student(noise, timesteps.to(noise.device), at.prompt_embeds)
        target = torch.stack([self.ends[key] for key in at.batch.keys]).to(noise.device)
        found = consistent(models.schedule, output, noise, timesteps)
        return ((found - target) ** 2).mean(dim=(1, 2, 3))

    def teacher_ends(self, models: Models, noise: Tensor, prompt_embeds: Tensor) -> Tensor:
        """(B, C, h, w): where the teacher arrives from `noise`, at the mean of its guidance."""
        guidance = torch.full((len(noise),), (self.lowest + self.highest) / 2)
        timesteps = torch.full((len(noise),), models.schedule.num_timesteps - 1)
        x = noise
        for _ in range(TEACHER_STEPS):
            _, to = nodes(timesteps, models.schedule, TEACHER_STEPS)
            x = guided_step(models, x, timesteps, to, prompt_embeds, guidance)
            timesteps = to
        return x
