"""New words that stand for what pictures show (Gal et al. 2022, https://arxiv.org/abs/2208.01618).

What is trained are vectors in place of token embeddings, see diffusion/words.py. The embedding is frozen, so
that none of its rows need be restored. With a LoRA beside them, by the same loss, it is pivotal tuning.
"""

from typing import Any

from torch import Tensor

from lorakit.training.denoise import Denoise
from lorakit.training.objective_config import names_of
from lorakit.training.objectives import Models, Pass


class TextualInversion(Denoise):
    """The loss of denoise; where denoise is there itself, nothing more."""

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.beside = "denoise" in names_of(cfg.objective)

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        if self.beside:
            return at.batch.latents.new_zeros(len(at.batch.keys)), {}
        return super().loss(models, at)

    def validation(self, models: Models, at: Pass) -> Tensor | None:
        return None if self.beside else super().validation(models, at)
