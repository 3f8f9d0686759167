"""The forward process of a diffusion model and its three parameterisations, in float64.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                     (Ho et al. 2020, eq. 4)
v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0                     (Salimans & Ho 2022, sec. 4)
SNR_t = alpha_bar_t / (1 - alpha_bar_t)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha_bar`: (T,) float64 on the CPU, the share of signal variance left at each timestep.

    `timesteps` are CPU tensors everywhere here, so that no coefficient makes a GPU wait.
    """

    alpha_bar: Tensor
    prediction_type: str = "epsilon"

    @classmethod
    def from_scheduler(cls, scheduler, prediction_type: str | None = None) -> "NoiseSchedule":
        """Take the betas of any diffusers scheduler, whatever it samples with (PNDM in SD 1.5)."""
        alpha_bar = torch.cumprod(1.0 - scheduler.betas.double(), dim=0)
        return cls(alpha_bar, prediction_type or scheduler.config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`: (B, 1, 1, 1)."""
        a = self.alpha_bar[timesteps].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt().to(like), (1 - a).sqrt().to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 `latents` (B, C, h, w), `noise` of the same shape and `timesteps` (B,)."""
        signal, sigma = self._at(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is asked to predict, (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._at(timesteps, latents)
        return signal * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, (B,) float64."""
        a = self.alpha_bar[timesteps]
        return a / (1 - a)
