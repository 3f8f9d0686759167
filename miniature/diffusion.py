"""The denoiser: its make, the cached latents that it trains on, and samples of it.

Latents are (B, C, h, w), scaled by the VAE's scaling_factor; prompt_embeds (B, L, D).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.ground.publish import publish_file
from lorakit.ground.randomness import derive_seed
from lorakit.weights.tensors import read_tensors, serialize
from miniature.autoencoder import to_tensor
from miniature.pictures import Table, rendered
from miniature.text import tokenize

# SD 1.5's noise schedule, as the DDIM sampler that it is used with here.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def load_vae(folder: Path | str, device: torch.device) -> Any:
    """A trained autoencoder, frozen, float32, channels last."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32)
    return vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def make_unet(
    channels: Sequence[int], layers: int, latent_channels: int, sample_size: int, text_width: int, seed: int
) -> Any:
    """SD 1.x's U-Net on three levels, with cross attention on all but the lowest; random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(derive_seed(seed, "unet/weights"))
    make: Any = UNet2DConditionModel
    unet = make(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads: the name is a mistake that SD's configs keep
        norm_num_groups=16,
    )
    return unet.to(memory_format=torch.channels_last)


def _latent_file(
    vae: Any, table: Table, folder: Path, part: int, pictures: Any, device: torch.device
) -> Path:
    path = folder / f"{part:05d}-{len(pictures)}.safetensors"
    if not path.exists():
        halves = []
        for start in range(0, len(pictures), 32):
            image = to_tensor(list(pictures[start : start + 32])).to(device)  # channels last: 4 times as fast
            means = [vae.encode(view).latent_dist.mode() for view in (image, image.flip(3))]
            halves.append(torch.stack(means, dim=1).half().cpu())
        publish_file(path, serialize({"means": torch.cat(halves)}, {}))
    return path


@torch.no_grad()
def cached_latents(vae: Any, table: Table, cache: Path, workers: int | None, device: torch.device) -> Tensor:
    """(N, 2, C, h, w) float16: means of the table's pictures and of their mirror images, scaled."""
    digest = hashlib.sha256()
    for name, value in vae.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    folder = cache / f"latents-{digest.hexdigest()[:8]}-{table.folder(cache).name.removeprefix('pictures-')}"
    files = [
        _latent_file(vae, table, folder, part, pictures, device)
        for part, pictures in enumerate(rendered(table, cache, workers))
    ]
    means = torch.cat([read_tensors(path)[0]["means"] for path in files])
    return (means.float() * vae.config.scaling_factor).half()


def caption_ids(tokenizer: Any, table: Table) -> Tensor:
    """(N, 2, L) token ids: of the plain caption, and of the one with details."""
    rows = [table.row(index) for index in range(table.count)]
    forms = [[scene.caption(style, details) for scene, style in rows] for details in (False, True)]
    return torch.stack([tokenize(tokenizer, captions) for captions in forms], dim=1)


@torch.no_grad()
def sample_latents(
    unet: Any,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    control: Any = None,
) -> Tensor:
    """Scaled latents by DDIM (Song et al. 2021) with guidance eps_n + g (eps_p - eps_n), or eps_p at g = 1.

    Args:
        noise: (B, C, h, w); `prompt_embeds` and `negative_embeds` have B rows too.
        control: called with (x, t, prompt_embeds), returns the residuals of a ControlNet.
    """
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    guided = guidance_scale != 1
    embeds = torch.cat([negative_embeds, prompt_embeds]) if guided else prompt_embeds
    x = noise.contiguous(memory_format=torch.channels_last)
    for t in scheduler.timesteps:
        both = torch.cat([x, x]) if guided else x
        residuals = control(both, t, embeds) if control else {}
        eps = unet(both, t, encoder_hidden_states=embeds, **residuals).sample
        if guided:
            negative, positive = eps.chunk(2)
            eps = negative + guidance_scale * (positive - negative)
        x = scheduler.step(eps, t, x).prev_sample
    return x


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) float32 from scaled latents, sixteen at a time."""
    parts = [vae.decode(part / vae.config.scaling_factor).sample.float() for part in latents.split(16)]
    return torch.cat(parts)
