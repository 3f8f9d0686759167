"""How well a U-Net, with LoRAs or without, fits a picture."""

import torch
from torch import Tensor

from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.inversion_plan import FIT_TIMESTEPS
from lorakit.ground import randomness

NOTICED = 1.02
"""A loss that is higher by this factor is no longer chance."""


@torch.no_grad()
def fit_losses(denoiser: Denoiser, rows: Rows, latents: Tensor) -> list[float]:
    """The training loss of one picture (1, C, h, w) under each row, the mean of a few fixed timesteps."""
    schedule = denoiser.schedule
    timesteps = [int(share * schedule.num_timesteps) for share in FIT_TIMESTEPS]
    total = torch.zeros(len(rows), device=latents.device)
    for timestep in timesteps:
        noise = randomness.normal(tuple(latents.shape), 0, "fit", timestep).to(latents)
        noisy = schedule.add_noise(latents, noise, torch.tensor([timestep]))
        predicted = denoiser(noisy.expand(len(rows), -1, -1, -1), timestep, rows)
        total += (predicted - noise).square().flatten(1).mean(1)
    return (total / len(timesteps)).tolist()
