"""The ControlNet: its make, and how it steers a sampler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.ground.randomness import derive_seed


def make_controlnet(unet: Any, hint_channels: Sequence[int], seed: int) -> Any:
    """A copy of the U-Net's way down with zero convolutions; its effect is nothing until it is trained."""
    from diffusers import ControlNetModel

    torch.manual_seed(derive_seed(seed, "controlnet/weights"))
    controlnet: Any = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=tuple(hint_channels), load_weights_from_unet=True
    )
    return controlnet.to(memory_format=torch.channels_last).requires_grad_(True).train()


def steering(
    controlnet: Any, hints: Tensor, scale: float
) -> Callable[[Tensor, Tensor, Tensor], dict[str, Any]]:
    """What `diffusion.sample_latents` calls at each step.

    Args:
        hints: (B, 3, H, W) in [0, 1], white edges on black.
        scale: the residuals are multiplied by this.
    """

    def control(x: Tensor, t: Tensor, embeds: Tensor) -> dict[str, Any]:
        condition = hints.repeat(len(x) // len(hints), 1, 1, 1)
        down, mid = controlnet(
            x,
            t,
            encoder_hidden_states=embeds,
            controlnet_cond=condition,
            conditioning_scale=scale,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    return control
