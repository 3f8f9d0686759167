"""Samples of a base in bulk, what sees that they are soft, and the sheet that shows how a training goes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lorakit.diffusion import metrics
from lorakit.ground.randomness import normal
from lorakit.pictures.images import from_array, save_png
from lorakit.pictures.sheet import contact_sheet
from miniature.diffusion import decode, sample_latents
from miniature.landscapes import BASE_STYLES, FOREGROUNDS, MOUNTAINS, TIMES, Scene
from miniature.text import tokenize

Parts = tuple[Any, Any, Any, Any]  # vae, unet, text_encoder, tokenizer


def prompts_to_watch() -> list[str]:
    """Eight prompts that show every attribute."""
    prompts = []
    for i in range(8):
        scene = Scene(
            seed=0,
            time=TIMES[i % 4],
            mountain=MOUNTAINS[(i + i // 4) % 4],
            foreground=FOREGROUNDS[(3 * i + 1) % 4],
            layers=("single", "range", "distant ranges")[i % 3],
        )
        prompts.append(scene.caption(BASE_STYLES[i % 3]))
    return prompts


@torch.no_grad()
def embed(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(B, L, D)."""
    device = next(text_encoder.parameters()).device
    return text_encoder(tokenize(tokenizer, list(prompts)).to(device))[0]


@torch.no_grad()
def sample_pictures(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int = 16,
) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: one picture per prompt and seed; its noise follows from its seed alone."""
    vae, unet, text_encoder, tokenizer = parts
    device = next(unet.parameters()).device
    side, channels = unet.config.sample_size, unet.config.in_channels
    pictures = []
    for start in range(0, len(prompts), batch_size):
        chunk, numbers = prompts[start : start + batch_size], seeds[start : start + batch_size]
        noise = torch.stack([normal((channels, side, side), seed, "sample") for seed in numbers]).to(device)
        embeds = embed(text_encoder, tokenizer, [*chunk, ""])
        negative = embeds[-1:].expand(len(chunk), -1, -1)
        latents = sample_latents(unet, embeds[:-1], negative, noise, steps, guidance_scale)
        pictures.append(decode(vae, latents).clamp(-1, 1).cpu())
    return torch.cat(pictures)


def sharpness(pictures: Tensor) -> float:
    """Mean over pictures (B, 3, H, W) in [-1, 1], in grey levels of 255; see lorakit's metrics."""
    return mean(metrics.sharpness(from_array(picture.numpy())) for picture in pictures)


def texture(distance: metrics.EncoderDistance, pictures: Tensor) -> Tensor:
    """Moments of pictures (B, 3, H, W) in [-1, 1] in the encoder of a VAE, for `texture_distance`.

    Of every channel of every level, its features at unit length over the channels: mean and deviation over
    places; of these mean and deviation over the pictures. It sees blur, which the classifier was taught to
    overlook.
    """
    rows = []
    for picture in pictures:
        levels = [level[0].flatten(1).double().cpu() for level in distance.levels(picture[None])]  # (C, h w)
        rows.append(torch.cat([moment for level in levels for moment in (level.mean(1), level.std(1))]))
    stacked = torch.stack(rows)
    return torch.stack([stacked.mean(0), stacked.std(0)])  # (2, moments)


def texture_distance(a: Tensor, b: Tensor) -> float:
    """Squared distance of two sets' `texture`; to be told in units of that of two sets of renders."""
    return float(((a - b) ** 2).sum())


def draw_samples(
    path: Path, parts: Parts, prompts: Sequence[str], *, steps: int, guidance_scale: float, columns: int = 4
) -> None:
    """A sheet with a row per prompt and a column per seed."""
    rows = [(prompt, seed) for prompt in prompts for seed in range(columns)]
    pictures = sample_pictures(
        parts, [row[0] for row in rows], [row[1] for row in rows], steps=steps, guidance_scale=guidance_scale
    )
    images = [from_array(picture.numpy()) for picture in pictures]
    sheet = contact_sheet(
        [images[i * columns : (i + 1) * columns] for i in range(len(prompts))],
        row_labels=list(prompts),
        column_labels=[f"seed {seed}" for seed in range(columns)],
        title=f"{steps} DDIM steps, guidance {guidance_scale:g}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, path)
