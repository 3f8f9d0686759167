"""Batches for text-to-image, ControlNet and motion module as a function of the step."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.ground.randomness import derive_seed, generator, normal
from lorakit.motion.carried_noise import film_noise
from lorakit.pictures.edges import canny, hint_picture
from miniature.autoencoder import to_tensor
from miniature.clips import Clips
from miniature.diffusion import SCHEDULER
from miniature.photographs import photograph_crop, pyramids
from miniature.pictures import picture
from miniature.text import tokenize


class Samples:
    """Latents with captions, timesteps and noise.

    Args:
        latents: (N, 2, C, h, w) float16, of each picture and its mirror image.
        ids: (N, 2, L), of the plain caption and of the one with details.
        cfg: has seed, caption_dropout and details_share.
    """

    def __init__(self, latents: Tensor, ids: Tensor, tokenizer: Any, cfg: Any):
        from diffusers import DDIMScheduler

        self.latents, self.ids, self.cfg = latents, ids, cfg
        self.empty = tokenize(tokenizer, [""])[0]
        self.schedule = NoiseSchedule.from_scheduler(DDIMScheduler(**SCHEDULER))

    def rows(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which pictures, and whether each is mirrored: (B,) each."""
        rng = np.random.default_rng(derive_seed(self.cfg.seed, "rows", step))
        return rng.integers(len(self.latents), size=size), rng.integers(2, size=size)

    def batch(self, step: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_0 (B, C, h, w), token ids (B, L), timesteps (B,) on the CPU, eps like x_0."""
        rows, mirrored = self.rows(step, size)
        rng = np.random.default_rng(derive_seed(self.cfg.seed, "captions", step))
        details = (rng.uniform(size=size) < self.cfg.details_share).astype(np.int64)
        dropped = torch.from_numpy(rng.uniform(size=size) < self.cfg.caption_dropout)
        x_0 = self.latents[rows, mirrored].float()
        ids = torch.where(dropped[:, None], self.empty, self.ids[rows, details])
        source = generator(self.cfg.seed, "noise", step)
        timesteps = torch.randint(self.schedule.num_timesteps, (size,), generator=source)
        eps = torch.randn(x_0.shape, generator=source)
        x_0, eps = (x.to(device).contiguous(memory_format=torch.channels_last) for x in (x_0, eps))
        return x_0, ids.to(device), timesteps, eps


class Hints:
    """Edges of the pictures, with blur and thresholds drawn for each sample."""

    def __init__(self, parts: list[np.ndarray], seed: int):
        self.parts, self.seed = parts, seed

    def batch(self, step: int, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(B, 3, H, W) in [0, 1], white on black, of the rows that `Samples.rows` gives for this step."""
        rng = np.random.default_rng(derive_seed(self.seed, "hints", step))
        hints = []
        for row, flip in zip(rows, mirrored, strict=True):
            edges = drawn_edges(rng, picture(self.parts, int(row)).astype(np.float32) / 255)
            hints.append(hint_picture(edges[:, ::-1] if flip else edges))
        return torch.from_numpy(np.stack(hints)).contiguous(memory_format=torch.channels_last)


class Photographs:
    """Crops of photographs with their edges, of kinds and colours that no render has.

    Args:
        side: pixels of a crop.
        share: of each batch.
    """

    def __init__(self, side: int, share: float, seed: int):
        self.photographs, self.side, self.share, self.seed = pyramids(side), side, share, seed

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures (n, 3, H, W) in [-1, 1] and hints (n, 3, H, W) in [0, 1]; n is the share of `size`."""
        rng = np.random.default_rng(derive_seed(self.seed, "photographs", step))
        count = round(self.share * size)
        crops = [photograph_crop(rng, self.photographs, self.side) for _ in range(count)]
        hints = [hint_picture(drawn_edges(rng, crop)) for crop in crops]
        return to_tensor(crops), torch.from_numpy(np.stack(hints))


def drawn_edges(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Edges of a picture (H, W, 3) in [0, 1], with blur and thresholds drawn, (H, W)."""
    high = 0.045 * np.exp(rng.uniform(-1.0, 0.8))
    return canny(image, rng.uniform(0.6, 2.0), high * rng.uniform(0.3, 0.6), high)


class ClipSamples:
    """Clips with captions, timesteps, and noise that lies in their scene or is each frame's own.

    Args:
        parts: latents (n, F, C, h, w) float16 of clips.cached_clips.
        cfg: has seed, caption_dropout and carried.
    """

    def __init__(self, parts: list[Tensor], clips: Clips, tokenizer: Any, cfg: Any):
        from diffusers import DDIMScheduler

        self.latents, self.clips, self.cfg = torch.cat(parts), clips, cfg
        captions = [scene.caption(style) for scene, style in map(clips.table.row, range(clips.table.count))]
        self.ids, self.empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]
        self.schedule = NoiseSchedule.from_scheduler(DDIMScheduler(**SCHEDULER))

    def batch(self, step: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_0 (B, F, C, h, w), token ids (B, L), timesteps (B,) on the CPU, eps like x_0."""
        rng = np.random.default_rng(derive_seed(self.cfg.seed, "clips", step))
        rows = rng.integers(len(self.latents), size=size)
        dropped = torch.from_numpy(rng.uniform(size=size) < self.cfg.caption_dropout)
        x_0 = self.latents[rows].float()
        ids = torch.where(dropped[:, None], self.empty, self.ids[rows])
        source = generator(self.cfg.seed, "clip noise", step)
        timesteps = torch.randint(self.schedule.num_timesteps, (size,), generator=source)
        noise = [self._noise(x_0[i], int(row), step, i, rng) for i, row in enumerate(rows)]
        return x_0.to(device), ids.to(device), timesteps, torch.stack(noise).to(device)

    def _noise(self, x_0: Tensor, row: int, step: int, i: int, rng: np.random.Generator) -> Tensor:
        """(F, C, h, w)."""
        is_carried, share = rng.uniform() < self.cfg.carried, rng.uniform(0.5, 1)
        own = normal(tuple(x_0.shape), self.cfg.seed, "clip noise", step, i)
        if not is_carried:
            return own
        factor = self.clips.table.size // x_0.shape[-1]
        seed = derive_seed(self.cfg.seed, "clip scene", step, i)
        return film_noise(own[0], seed, self.clips.camera(row)[1], factor, share)
