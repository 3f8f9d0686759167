"""A LoRA on the temporal attention of a motion adapter learns how clips move (AnimateDiff, Guo et al. 2024).

The student sees the frames of a clip together; the base and the adapter stay as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.models import Base
from lorakit.ground.randomness import derive_seed, normal, uniform
from lorakit.ground.shards import Shards
from lorakit.motion.carried_noise import film_noise
from lorakit.motion.filming import Studio
from lorakit.sampling.samplers import make_scheduler, picture_noise
from lorakit.training.caches import keep_moments
from lorakit.training.clips import Clip, StillClip
from lorakit.training.objectives import Models, Pass, Term

SHOWN = 4
"""Frames of a film on the sheet of samples."""


def motion_weight(snr: Tensor, most: float, prediction_type: str) -> Tensor:
    """Weights by which a loss on what the model predicts becomes one on v: (SNR + 1) / SNR of one on eps.

    Where there is much noise no more than `most` times that on eps.
    """
    weight = ((snr + 1) / snr).clamp(max=most)
    if prediction_type == "epsilon":
        return weight
    return weight * (snr if prediction_type == "sample" else snr / (snr + 1))


class Motion(Term):
    """Mean squared error of the prediction over the frames of a clip."""

    def __init__(self, cfg: Any):
        self.most_weight: float = cfg.motion.most_weight

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        error = (at.prediction.float() - at.target.float()) ** 2  # (B, F, C, h, w)
        loss = error.flatten(1).mean(1)  # (B,)
        snr = models.schedule.snr(at.batch.timesteps)
        return loss * motion_weight(snr, self.most_weight, models.schedule.prediction_type).to(loss), {}


class Carried:
    """Noise of a share of the samples lies in the scene of their clip and is seen through its camera.

    Args:
        clips: of all views.
        factor: pixels of a frame that make a latent one.
    """

    def __init__(self, clips: Sequence[StillClip], cfg: Any, factor: int):
        self.clips, self.factor = clips, factor
        self.share: float = cfg.motion.carried
        self.seed: int = cfg.seed

    def __call__(self, view: int, position: int, noise: Tensor) -> Tensor:
        """(F, C, h, w) for sample `position`, which shows the clip `view`; `noise` is each frame's own."""
        if uniform(self.seed, "carried", position) >= self.share:
            return noise
        part = 0.5 + 0.5 * uniform(self.seed, "carried part", position)
        seed = derive_seed(self.seed, "carried scene", position)
        return film_noise(noise[0], seed, self.clips[view].poses, self.factor, part)


def encode_clips(
    clips: Sequence[Clip],
    base: Base,
    shards: Shards,
    vae_hash: str,
    *,
    image_options: dict[str, Any],
    threads: int = 1,
    dtype: str = "float32",
) -> Iterator[Clip]:
    """Encode clips into the cache, frame by frame, and yield each once its entry is there.

    Args:
        threads: of no use here.

    Raises:
        UserError: as encode_views, or a frame that cannot be read.
    """
    for clip in clips:
        pixels = map(torch.from_numpy, clip.frames(image_options["max_pixels"]))
        moments = torch.cat([base.encode(frame[None]) for frame in pixels])  # (F, 2C, h, w)
        keep_moments(shards, clip, moments.cpu(), vae_hash, dtype)
        yield clip


def sample_strips(
    base: Base,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    frames: int,
    seeds: Sequence[int],
    shape: tuple[int, int],
    steps: int,
    guidance_scale: float,
) -> list[Image.Image]:
    """For each seed some frames of a film side by side, each with noise of its own."""
    strips = []
    for seed in seeds:
        still = picture_noise(base, [seed], shape)[0]
        own = [normal(tuple(still.shape), seed, "frame", i) for i in range(frames)]
        embeds = prompt_embeds.expand(frames, -1, -1)
        whole = [[(i, 1.0) for i in range(frames)]]
        studio = Studio(
            base,
            make_scheduler(base, "ddim"),
            embeds,
            negative_embeds,
            guidance_scale,
            wide=whole,
            agreement=None,
            batch_size=frames,
        )
        latents = studio.denoise(torch.stack(own), steps)
        shown = dict.fromkeys(round(i * (frames - 1) / (SHOWN - 1)) for i in range(SHOWN))
        strips.append(_side_by_side(base.decode_pictures(latents[list(shown)])))
    return strips


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * width, 0))
    return strip
