"""A ControlNet beside its U-Net, as one model that predicts noise (Zhang, Rao and Agrawala 2023)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


class Controlled(torch.nn.Module):
    """Called as the U-Net is.

    Args:
        hints: (B, 3, H, W) in [0, 1]; a batch of k B rows, as guidance makes it, is k times these pictures.
        scale: factor on what the ControlNet adds.
        timesteps: at which it takes part.
    """

    def __init__(self, unet: Any, controlnet: Any, hints: Tensor, scale: float, timesteps: Collection[int]):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet
        self.hints, self.scale, self.timesteps = hints.to(unet.device, unet.dtype), scale, timesteps

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, inputs: Tensor, timestep: int, encoder_hidden_states: Tensor, **options: Any) -> Any:
        added: dict[str, Any] = {}
        if self.scale and timestep in self.timesteps:
            down, middle = self.controlnet(
                inputs,
                timestep,
                encoder_hidden_states=encoder_hidden_states,
                controlnet_cond=self.hints.repeat(len(inputs) // len(self.hints), 1, 1, 1),
                conditioning_scale=self.scale,
                return_dict=False,
            )
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(inputs, timestep, encoder_hidden_states=encoder_hidden_states, **added, **options)
