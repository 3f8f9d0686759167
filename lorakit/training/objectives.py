"""Training objectives: `loss(student, batch, schedule, ...) -> (B,)`, one loss per sample.

`student(x_t, timesteps, encoder_hidden_states=...)` is the U-Net with its LoRA, maybe wrapped for several
processes. A script picks the function from OBJECTIVES by the config's `objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device but for the timesteps.

    latents        (B, C, h, w)  float32, scaled by the VAE's scaling factor
    noise          (B, C, h, w)  float32, with the noise offset in it
    timesteps      (B,)          int64, on the CPU: coefficients are made there in float64
    prompt_embeds  (B, L, D)     float32, or None while the text encoder is trained
    input_ids      (B, L)        int64, or None when the text states are cached
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor | None
    input_ids: Tensor | None

    def text_states(self, text_encoder: Callable | None) -> Tensor:
        """(B, L, D): the cached states, or what `text_encoder` makes of the ids while it is trained."""
        if text_encoder is not None:
            return text_encoder(self.input_ids)[0]
        assert self.prompt_embeds is not None
        return self.prompt_embeds


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma weights of a loss on what the model predicts (Hang et al. 2023, eq. 8 and sec. 3.4).

    min(SNR, gamma) is the weight of a loss on x_0; one on eps carries SNR of it, one on v carries SNR + 1.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return clipped
    return clipped / (snr if prediction_type == "epsilon" else snr + 1)


def denoise(
    student: Callable,
    batch: Batch,
    schedule: NoiseSchedule,
    prompt_embeds: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the prediction, per sample (Ho et al. 2020, eq. 14), (B,)."""
    x_t = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)  # (B, C, h, w)
    timesteps = batch.timesteps.to(x_t.device)
    prediction = student(x_t, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    loss = torch.mean((prediction.float() - target.float()) ** 2, dim=(1, 2, 3))  # (B,)
    if snr_gamma is not None:
        weight = min_snr_weight(schedule.snr(batch.timesteps), snr_gamma, schedule.prediction_type)
        loss = loss * weight.to(loss)
    return loss


OBJECTIVES = {"denoise": denoise}
