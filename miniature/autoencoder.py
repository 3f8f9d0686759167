"""The autoencoder: its make, its loss, its training batches and its figures.

Images are (B, 3, H, W) in [-1, 1]; latents (B, C, H/8, W/8).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.ground.randomness import derive_seed
from lorakit.pictures.images import crop as centre_crop
from lorakit.pictures.images import load_image, resize_to_cover
from miniature.landscapes import STYLES, render
from miniature.photographs import dead_leaves, photograph_crop, pyramids, random_crop
from miniature.pictures import Table, judging_scene, picture, rendered

FACTOR = 8
HELD_OUT_PHOTOGRAPHS = ("dataset/mountain/mountain.jpg", "dataset/mountain_up/mountain_up.jpg")


def make_autoencoder(
    block_out_channels: Sequence[int],
    latent_channels: int,
    layers_per_block: int,
    norm_num_groups: int,
    sample_size: int,
    seed: int,
) -> Any:
    """An AutoencoderKL of factor 8 without attention, with random weights, channels last."""
    from diffusers import AutoencoderKL

    assert len(block_out_channels) == 4, "four levels make a factor of 8"
    torch.manual_seed(derive_seed(seed, "autoencoder/weights"))
    make: Any = AutoencoderKL  # its annotations take tuples of one only
    vae = make(
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=False,
        sample_size=sample_size,
    )
    return vae.to(memory_format=torch.channels_last)


def reconstruction_loss(
    image: Tensor, rebuilt: Tensor, gradient_weight: float, squared_weight: float
) -> Tensor:
    """Mean absolute error of pixels and of their differences to the next one, and squared error; a scalar."""
    error = rebuilt.float() - image
    down, right = error.diff(dim=2).abs().mean(), error.diff(dim=3).abs().mean()
    squared = error.square().mean()
    return error.abs().mean() + gradient_weight * (down + right) + squared_weight * squared


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of N(mean, exp(logvar)) from N(0, 1), mean over latent elements (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB after rounding to 8 bits, (B,)."""
    levels = [((x.clamp(-1, 1) + 1) * 127.5).round() for x in (a.float(), b.float())]
    error = ((levels[0] - levels[1]) ** 2).mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-3))


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """(B, 3, H, W) in [-1, 1], channels last, from (H, W, 3) uint8 or float32 in [0, 1]."""
    scaled = [p.astype(np.float32) / (255 if p.dtype == np.uint8 else 1) for p in pictures]
    stacked = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) * 2 - 1
    return stacked.contiguous(memory_format=torch.channels_last)


class Crops:
    """Training batches as a function of the step: renders, photographs and dead leaves in fixed shares."""

    def __init__(
        self,
        table: Table,
        cache: Path,
        workers: int | None,
        crop: int,
        seed: int,
        shares: tuple[float, float],
    ):
        self.table, self.crop, self.seed, self.shares = table, crop, seed, shares
        self.parts = rendered(table, cache, workers)
        self.photographs = pyramids(crop)
        rng = np.random.default_rng(derive_seed(seed, "leaves"))
        count = 48 if shares[1] else 0
        self.leaves = [dead_leaves(rng, max(2 * crop, 64)) for _ in range(count)]

    def batch(self, step: int, size: int) -> Tensor:
        """(size, 3, crop, crop)."""
        rng = np.random.default_rng(derive_seed(self.seed, "crops", step))
        photographs, leaves = (round(share * size) for share in self.shares)
        parts = [photograph_crop(rng, self.photographs, self.crop) for _ in range(photographs)]
        for _ in range(leaves):
            parts.append(random_crop(rng, self.leaves[int(rng.integers(len(self.leaves)))], self.crop))
        while len(parts) < size:
            whole = picture(self.parts, int(rng.integers(self.table.count)))
            parts.append(random_crop(rng, whole, self.crop).astype(np.float32) / 255)
        return to_tensor(parts)


def held_out_pictures(size: int, per_style: int, root: Path) -> dict[str, Tensor]:
    """Pictures for judging, by kind: renders of each style; photographs whole, and as crops."""
    kinds = {}
    for style in STYLES:
        renders = [np.asarray(render(judging_scene(i, style), style, size)) for i in range(per_style)]
        kinds[style] = to_tensor(renders)
    photographs = [load_image(root / name) for name in HELD_OUT_PHOTOGRAPHS]
    whole = [centre_crop(resize_to_cover(image, size, size), size, size) for image in photographs]
    kinds["photographs"] = to_tensor([np.asarray(image) for image in whole])
    kinds["photograph crops"] = to_tensor(
        [
            np.asarray(image)[top : top + size, left : left + size]
            for image in photographs
            for top in range(0, image.height - size + 1, size)
            for left in range(0, image.width - size + 1, size)
        ]
    )
    return kinds


@torch.no_grad()
def round_trip(vae: Any, images: Tensor, batch_size: int = 16) -> Tensor:
    """Decoded means of the posterior, float32."""
    device = next(vae.parameters()).device
    rebuilt = []
    for image in images.split(batch_size):
        image = image.to(device).contiguous(memory_format=torch.channels_last)
        rebuilt.append(vae.decode(vae.encode(image).latent_dist.mode()).sample.float().cpu())
    return torch.cat(rebuilt)


def judge(vae: Any, kinds: dict[str, Tensor]) -> dict[str, float]:
    """Mean PSNR of the round trip in dB, by kind."""
    return {kind: float(psnr(round_trip(vae, images), images).mean()) for kind, images in kinds.items()}


@torch.no_grad()
def latent_scale(vae: Any, images: Tensor) -> float:
    """What makes the latents' standard deviation 1 (Rombach et al. 2022, app. G): SD's scaling_factor."""
    device = next(vae.parameters()).device
    latents = [vae.encode(part.to(device)).latent_dist.mode().float() for part in images.split(16)]
    return 1 / float(torch.cat(latents).std())
