"""Pictures that move evenly with their noise (Guo et al. 2024, Smooth Diffusion, arXiv:2312.04410).

Of each sample the rate is r = |J^T y|, J the derivative of the predicted x_0 by the noise and y a random
picture of expected norm sqrt(1 - alpha_bar_t) (eq. 9); the loss is (r - a)^2, a the running mean of r.
Deviations from the authors' code: a is corrected for its start at 0, moves once per step by the mean over all
samples, and carries no gradient, so that a step does not depend on how it is split.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.training.objective_config import names_of
from lorakit.training.objectives import Models, Pass, Term
from lorakit.training.smooth_config import smooth_settings


class Smooth(Term):
    """The squared distance of a sample's rate to the running mean of all."""

    def __init__(self, cfg: Any):
        settings = smooth_settings(cfg)
        self.weight, self.decay, self.noise_every = settings.weight, settings.decay, settings.every
        self.judges = names_of(cfg.objective) == ("smooth",)
        self.mean, self.steps = 0.0, 0

    @property
    def usual(self) -> float | None:
        """The running mean a, corrected for its start at 0 (Kingma & Ba 2015, sec. 3); None at first."""
        return self.mean / (1 - (1 - self.decay) ** self.steps) if self.steps else None

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """Every `noise_every`-th sample carries it; `rate` is 0 where `measured` is."""
        none = at.batch.latents.new_zeros(len(at.batch.keys))
        if not at.noise_rows:
            return 0 * at.prediction.flatten(1).mean(dim=1), {"rate": none, "measured": none}
        rows = torch.tensor(at.noise_rows, device=none.device)
        rate = rates(models, at, create_graph=True)  # (R,)
        loss = self.noise_every * (rate - self._usual(rate)) ** 2
        told = {"rate": rate.detach(), "measured": torch.ones_like(rate)}
        placed = {name: none.index_add(0, rows, each) for name, each in told.items()}
        return none.index_add(0, rows, loss), placed

    def validation(self, models: Models, at: Pass) -> Tensor | None:
        """How uneven the rates are; beside another objective it has no say, for that one sees the price."""
        if not self.judges:
            return None
        with torch.enable_grad():
            again = Pass(models, at.batch, at.prompt_embeds, noise_gradient=True)
            rate = rates(models, again, create_graph=False).detach()
        return (rate - self._usual(rate)) ** 2

    def finish_step(self, means: Mapping[str, float]) -> None:
        if means["measured"] > 0:
            self.mean += self.decay * (means["rate"] / means["measured"] - self.mean)
            self.steps += 1

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean, self.steps = state["mean"], int(state["steps"])

    def _usual(self, rate: Tensor) -> Tensor | float:
        """The first step has nothing to compare with: its loss is 0, whatever else is in its batch."""
        return rate.detach() if self.usual is None else self.usual


def rates(models: Models, at: Pass, create_graph: bool) -> Tensor:
    """r of each sample of `at.noise_rows`, (R,), float32.

    Args:
        create_graph: keep what a gradient of r needs: a second derivative of the U-Net.
    """
    rows, schedule = at.noise_rows, models.schedule
    timesteps = at.batch.timesteps[rows]
    x_0, _ = schedule.predicted(at.prediction[rows].float(), at.x_t[rows], timesteps)  # (R, C, h, w)
    _, sigma = schedule.at(timesteps, x_0)  # (R, 1, 1, 1)
    direction = at.batch.normal("smooth direction")[rows] * sigma / math.sqrt(x_0[0].numel())
    (pulled,) = torch.autograd.grad((x_0 * direction).sum(), at.noise, create_graph=create_graph)
    return pulled[rows].flatten(1).norm(dim=1)
