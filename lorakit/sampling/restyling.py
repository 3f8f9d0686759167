"""From picture to picture: SDEdit (Meng et al. 2022) with any LoRAs, its edges held by a ControlNet for Canny
(Zhang, Rao and Agrawala 2023).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor

from lorakit.diffusion.models import Base, load_model
from lorakit.sampling.samplers import batch_options, make_pipeline, picture_noise
from lorakit.weights.controlnet import fetch_controlnet, inspect_controlnet


def load_controlnet(name: str, base: Base) -> Any:
    """A ControlNet for this base, in its dtype, frozen; one of the hub is fetched where it is not here.

    Raises:
        BaseError: it cannot be loaded, or is made for another base.
    """
    from diffusers import ControlNetModel

    info = inspect_controlnet(name, base.info)
    info = info if info.known else fetch_controlnet(name, base.info)
    make = ControlNetModel.from_config
    controlnet = load_model(f"{name}: as a ControlNet it", make, info.config, info.places, base.dtype)
    return controlnet.to(base.device)


class _SeededStart:
    """diffusers' img2img with latents of any number of channels, a float32 VAE, and noise by seed.

    `start` holds (base, seeds). The latents are the mean of the VAE's posterior, not a draw from it.
    """

    start: tuple[Base, Sequence[int]]
    scheduler: Any

    def prepare_latents(self, image: Tensor, timestep: Tensor, *_: Any, **__: Any) -> Tensor:
        """x_t of `image` (B, 3, H, W) in [-1, 1] at the first timestep (B,)."""
        base, seeds = self.start
        noise = picture_noise(base, seeds, (image.shape[3], image.shape[2]))
        return self.scheduler.add_noise(base.mean_latents(image).to(noise), noise, timestep)


class _Img2Img(_SeededStart, StableDiffusionImg2ImgPipeline):
    pass


class _ControlledImg2Img(_SeededStart, StableDiffusionControlNetImg2ImgPipeline):
    pass


@torch.no_grad()
def restyle(
    base: Base,
    controlnet: Any,
    scheduler: Any,
    pictures: Sequence[Image.Image],
    hints: Sequence[Image.Image],
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    seeds: Sequence[int],
    strength: float,
    steps: int,
    guidance_scale: float,
    control: dict[str, float],
) -> list[Image.Image]:
    """Each picture anew: noised to `strength` of the way, then denoised in strength * steps steps.

    Args:
        controlnet: None leaves the edges free, and `hints` and `control` without use.
        prompt_embeds: a row for each picture, or one for all; `negative_embeds` likewise.
        control: controlnet_conditioning_scale, control_guidance_start and control_guidance_end.
    """
    options = batch_options(base, prompt_embeds, negative_embeds, seeds)
    options |= {"strength": strength, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    if controlnet is None:
        pipe = make_pipeline(_Img2Img, base, scheduler)
    else:
        pipe = make_pipeline(_ControlledImg2Img, base, scheduler, controlnet=controlnet)
        options |= {"control_image": list(hints)} | control
    pipe.start = base, seeds
    return base.decode_pictures(pipe(image=list(pictures), **options).images)
