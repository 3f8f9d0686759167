"""From picture to picture along the picture's own path from noise, so that what is not restyled stays.

The picture is inverted under its own words by the base alone (Song et al. 2021), and each styled step is put
right by what the same step without the style misses the path by (after Ju et al. 2024), or by a share of it.
Of the whole of it, without a LoRA and under its own words, the result is what the autoencoder makes of the
picture, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.control import Controlled
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.inversion import edit_anchored, sample
from lorakit.diffusion.lora import lora_disabled
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import Inverting, encode_picture, invert_cached, path_name
from lorakit.diffusion.schedule import Grid
from lorakit.sampling.encoding import PromptEncoder
from lorakit.sampling.grid import Batch
from lorakit.sampling.style_plan import CONTROL, StyleConfig

KEPT = 64
"""Pictures of which what the cells of a grid share stays in memory."""


class OwnPaths:
    """Pictures and their paths.

    Args:
        cfg: of the run.
        controlnet: None leaves the edges free.
        files: of the pictures; `pictures` as they are seen, `hints` their edges in black and white.
    """

    def __init__(
        self,
        base: Base,
        controlnet: Any,
        cfg: StyleConfig,
        files: Sequence[str],
        pictures: Sequence[Image.Image],
        hints: Sequence[Image.Image],
    ):
        self.base, self.controlnet, self.cfg = base, controlnet, cfg
        self.files, self.pictures, self.hints = files, pictures, hints
        self.encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs)
        self.schedule = base.noise_schedule()
        self.known = lru_cache(maxsize=KEPT)(self._known)

    @torch.no_grad()
    def restyle(self, batch: Batch) -> list[Image.Image]:
        """The pictures of a batch, whose cells are alike in their way."""
        cell, way, grid = batch.cfg, Way.of(batch.cfg), self.schedule.grid(batch.cfg.sampler()[1])
        texts = [(own.source_prompt, own.negative_prompt) for own in batch.cells]
        known = [self.known(n, *own, way) for n, own in zip(batch.subjects, texts, strict=True)]
        path, unstyled = (torch.cat(each, dim=1) for each in zip(*known, strict=True))
        negative = batch.negative_embeds.float().expand(len(known), -1, -1)
        styled = Rows.plain(batch.prompt_embeds.float(), negative)
        denoiser = self._denoiser(batch.subjects, way, grid)
        unchanged = torch.tensor([is_unchanged(own) for own in batch.cells], device=path.device)

        def noise_of(latents: Tensor, timestep: int) -> Tensor:
            return denoiser(latents, timestep, styled, way.guidance_scale)

        def predict(own: Tensor, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
            kept = unstyled[grid.timesteps.index(timestep) - way.first]
            # Kernels may round the rows of a batch differently: what is the picture's in all takes its noise.
            same = unchanged & (latents == own).flatten(1).all(1)
            return kept, torch.where(same.view(-1, 1, 1, 1), kept, noise_of(latents, timestep))

        if way.is_anchored:
            steps = edit_anchored(path, grid, predict, start=way.first, share=cell.anchor)
        else:
            steps = sample(path[way.first], grid.after(way.first), noise_of)
        *_, latents = steps
        return self.base.decode_pictures(latents)

    def _known(self, number: int, words: str, negative: str, way: "Way") -> tuple[Tensor, Tensor]:
        """The path (n + 1, 1, C, h, w) of a picture, and its unstyled noise from node `first` on."""
        base, picture, grid = self.base, self.pictures[number], self.schedule.grid(way.steps)
        how = Inverting(way.steps, prediction_type=self.cfg.prediction_type, clip_skip=self.cfg.clip_skip)
        with lora_disabled(base.unet, base.text_encoder):
            states, against = (each.float() for each in self.encoder.encode([words], negative))
            row = Rows.plain(states, against)
            name = path_name(how, self.cfg.path_folder(), base, picture.size, self.files[number], row)
            free = Denoiser(base.unet, self.schedule)
            path = invert_cached(free, row, [encode_picture(base, picture)], [name], how)
            if not way.is_anchored:
                return path, path[way.first : -1]
            denoiser = self._denoiser([number], way, grid)
            nodes = range(way.first, way.steps)
            noise = [denoiser(path[i], grid.timesteps[i], row, way.guidance_scale) for i in nodes]
        return path, torch.stack(noise)

    def _denoiser(self, numbers: Sequence[int], way: "Way", grid: Grid) -> Denoiser:
        """With the edges of these pictures, if there is a ControlNet."""
        if self.controlnet is None:
            return Denoiser(self.base.unet, self.schedule)
        scale, start, end = way.control
        run = grid.timesteps[way.first :]
        held = {t for i, t in enumerate(run) if i / len(run) >= start and (i + 1) / len(run) <= end}
        hints = np.stack([np.asarray(self.hints[number], np.float32) / 255 for number in numbers])
        hint = torch.from_numpy(hints).permute(0, 3, 1, 2)
        return Denoiser(Controlled(self.base.unet, self.controlnet, hint, scale, held), self.schedule)


@dataclass(frozen=True)
class Way:
    """How pictures are sampled, from node `first` of their paths on; `control` in the order of CONTROL."""

    steps: int
    first: int
    guidance_scale: float
    control: tuple[float, float, float]
    is_anchored: bool

    @classmethod
    def of(cls, cfg: StyleConfig) -> "Way":
        """That of a resolved config."""
        _, steps, guidance_scale = cfg.sampler()
        scale, start, end = (getattr(cfg, key) for key in CONTROL)
        first = steps - int(steps * cfg.strength)
        return cls(steps, first, guidance_scale, (scale, start, end), cfg.is_anchored)


def is_unchanged(cfg: StyleConfig) -> bool:
    """Whether nothing restyles the picture: its own words, and no LoRA."""
    loras = (*cfg.loras, *cfg.prompt_loras())
    return cfg.prompt == cfg.source_prompt and not any(lora.weight for lora in loras)
