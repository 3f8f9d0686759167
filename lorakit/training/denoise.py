"""The objective that every diffusion model is trained with: predict what was added to the latents."""

from typing import Any

import torch
from torch import Tensor

from lorakit.training.objectives import Models, Pass, Term


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma weights of a loss on what the model predicts (Hang et al. 2023, eq. 8 and sec. 3.4).

    min(SNR, gamma) is the weight of a loss on x_0; one on eps carries SNR of it, one on v carries SNR + 1.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return clipped
    return clipped / (snr if prediction_type == "epsilon" else snr + 1)


class Denoise(Term):
    """Mean squared error of the prediction (Ho et al. 2020, eq. 14), by min-SNR where `snr_gamma` is set."""

    def __init__(self, cfg: Any):
        self.snr_gamma: float | None = cfg.snr_gamma

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        error = (at.prediction.float() - at.target.float()) ** 2  # (B, C, h, w)
        if at.batch.weights is not None:
            error = error * at.batch.weights
        loss = torch.mean(error, dim=(1, 2, 3))  # (B,)
        if self.snr_gamma is not None:
            schedule, timesteps = models.schedule, at.batch.timesteps
            weight = min_snr_weight(schedule.snr(timesteps), self.snr_gamma, schedule.prediction_type)
            loss = loss * weight.to(loss)
        return loss, {}
