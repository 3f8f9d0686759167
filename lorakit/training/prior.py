"""A subject from a few pictures without damage to the rest.

Under other prompts the model shall answer as it does without its LoRA, on the same noisy latents: no class
images are needed, and what is held is the model itself. With pictures of the class it is DreamBooth's
preservation loss (Ruiz et al. 2023, eq. 2). Either is asked of every `every`-th sample, so that a step costs
1.75 times a plain one and not 2.2.
"""

from typing import Any

import torch
from torch import Tensor

from lorakit.training.batch import SampleKey
from lorakit.training.objectives import Models, Pass, Term
from lorakit.training.prior_config import prior_prompts


class Prior(Term):
    """Mean squared distance to the model without its LoRA, or the loss of pictures of the class."""

    def __init__(self, cfg: Any):
        self.weight, self.every = cfg.prior.weight, cfg.prior.every
        self.prompts = prior_prompts(cfg)

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        batch = at.batch
        loss = batch.latents.new_zeros(len(batch.keys))
        rows = batch.every(self.every)
        if rows:
            picked = torch.tensor(rows, device=loss.device)
            if self.prompts:
                distance = self._to_itself(models, at, rows, picked)
            else:
                distance = self._to_class(models, [batch.keys[row] for row in rows])
            loss = loss.index_add(0, picked, self.every * distance)
        return loss, {}

    def validation(self, models: Models, at: Pass) -> None:
        """None: the best LoRA is the one that knows its subject; staying as it is, is easiest unlearnt."""

    def _to_itself(self, models: Models, at: Pass, rows: list[int], picked: Tensor) -> Tensor:
        """Of the student to the teacher, (R,)."""
        draws = at.batch.integers("prior prompt", len(self.prompts))
        prompts = [self.prompts[draws[row]] for row in rows]
        # Detached: a gradient by the noise is another term's.
        x_t, timesteps = at.x_t.detach()[picked], at.timesteps[picked]  # (R, C, h, w), (R,)
        wanted = models.teacher(x_t, timesteps, (models.frozen_embed or models.embed)(prompts))
        found = models.student(x_t, timesteps, models.embed(prompts))
        return ((found.float() - wanted.float()) ** 2).mean(dim=(1, 2, 3))

    def _to_class(self, models: Models, keys: list[SampleKey]) -> Tensor:
        """Of the student to what was added to pictures of the class, (R,)."""
        assert models.class_batch is not None
        shown = Pass(models, *models.class_batch(keys))
        return ((shown.prediction.float() - shown.target.float()) ** 2).mean(dim=(1, 2, 3))
