"""From a checked table of pictures, and caches of what the base makes of them, to training batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorakit.diffusion.models import Base, posterior_sample
from lorakit.ground import randomness
from lorakit.pictures.folder import Table
from lorakit.pictures.views import Shape
from lorakit.training.batch import Batch, SampleKey
from lorakit.training.caches import Cache


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew each time a picture is seen.

    `noise_offset` is Guttenberg's (2023): a constant per channel added to the noise; `caption_dropout` the
    share of samples shown without their caption, for guidance; `unmasked_weight` the weight of the loss where
    a mask is black. Timestep t has a density that goes by t ** `timestep_bias`.
    """

    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    unmasked_weight: float = 0.0
    timestep_bias: float = 0.0


class TrainingData:
    """Batches by position: sample number `position` of a run is the same for any batch size or process count.

    Args:
        table: the checked rows.
        shapes: (width, height) in pixels at which each row is trained.
        latents: moments (2C, h, w) of all views, row after row.
        views: how many views each row has; one of them is drawn each time the row is shown.
        text_states: prompt -> (L, D), "" among them; None while the text encoder is trained.
        token_ids: prompt -> (L,), "" among them; None unless the text encoder is trained.
        masks: weights (1, h, w) of all views; None without masks.
        class_data: pictures that show the class of a subject (DreamBooth); None without them.
        carried: view, position and its own noise (F, C, h, w) -> the noise of a clip; None: its own.
    """

    def __init__(
        self,
        table: Table,
        shapes: Sequence[Shape],
        latents: Cache,
        views: Sequence[int],
        base: Base,
        *,
        text_states: Cache | None,
        token_ids: dict[str, Tensor] | None,
        augmentation: Augmentation,
        num_timesteps: int,
        seed: int,
        masks: Cache | None = None,
        class_data: "TrainingData | None" = None,
        carried: Callable[[int, int, Tensor], Tensor] | None = None,
    ):
        self.masks, self.class_data, self.carried = masks, class_data, carried
        self.table, self.shapes, self.latents, self.views = table, shapes, latents, views
        self.first_view = np.cumsum([0, *views])
        self.text_states, self.token_ids = text_states, token_ids
        self.augmentation, self.num_timesteps, self.seed = augmentation, num_timesteps, seed
        self.device = base.device
        self.scaling_factor = base.scaling_factor

    def batch(self, rows: Sequence[int] | np.ndarray, positions: Sequence[int]) -> Batch:
        """The micro-batch that shows `rows` (all of one bucket) as samples number `positions` of the run."""
        samples = list(zip(rows, positions, strict=True))
        latents, noise = zip(*(self._latent(row, position) for row, position in samples), strict=True)
        prompts = [self._prompt(row, position) for row, position in samples]
        timesteps = [self._timestep(position) for position in positions]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noise).to(self.device, non_blocking=True),
            timesteps=torch.tensor(timesteps),
            prompt_embeds=self._stack(self.text_states, prompts),
            input_ids=self._stack(self.token_ids, prompts),
            keys=tuple((self.seed, position) for position in positions),
            weights=self._weights([self._view(row, position) for row, position in samples]),
        )

    def batch_of(self, keys: Sequence[SampleKey]) -> Batch:
        """A micro-batch for the samples of another table, each with a row that its key draws."""
        positions = [int(number) for *_, number in keys]
        count = len(self.table.rows)
        rows = [randomness.integer(count, self.seed, "row", position) for position in positions]
        return self.batch(rows, positions)

    def _view(self, row: int, position: int) -> int:
        """The index among all views of the one that a sample shows."""
        return int(self.first_view[row]) + randomness.integer(self.views[row], self.seed, "view", position)

    def _weights(self, views: Sequence[int]) -> Tensor | None:
        """(B, 1, h, w)"""
        if self.masks is None:
            return None
        lowest = self.augmentation.unmasked_weight
        return lowest + (1 - lowest) * torch.stack([self.masks[view] for view in views])

    def _latent(self, row: int, position: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (C, h, w), or (F, C, h, w), on the device and their noise on the CPU."""
        seed, view = self.seed, self._view(row, position)
        moments = self.latents[view]
        shape = (*moments.shape[:-3], moments.shape[-3] // 2, *moments.shape[-2:])
        posterior_noise = randomness.normal(shape, seed, "posterior", position)
        posterior_noise = posterior_noise.to(self.device, non_blocking=True)
        noise = randomness.normal(shape, seed, "noise", position)
        if self.carried is not None:
            noise = self.carried(view, position, noise)
        if self.augmentation.noise_offset:
            offset = randomness.normal((shape[0], 1, 1), seed, "noise offset", position)
            noise = noise + self.augmentation.noise_offset * offset
        return posterior_sample(moments, posterior_noise, self.scaling_factor), noise

    def _prompt(self, row: int, position: int) -> str:
        draw = randomness.uniform(self.seed, "caption dropout", position)
        if draw < self.augmentation.caption_dropout:
            return ""
        captions = self.table.rows[row].captions
        return captions[randomness.integer(len(captions), self.seed, "caption", position)]

    def _timestep(self, position: int) -> int:
        bias = self.augmentation.timestep_bias
        if not bias:
            return randomness.integer(self.num_timesteps, self.seed, "timestep", position)
        share = randomness.uniform(self.seed, "timestep", position) ** (1 / (1 + bias))
        return min(int(share * self.num_timesteps), self.num_timesteps - 1)

    def describe(self, rows: Sequence[int] | np.ndarray, positions: Sequence[int]) -> str:
        """The samples in words, for the message of a run that diverged."""
        return "; ".join(
            f"{self.table.rows[row].name} at timestep {self._timestep(position)}"
            for row, position in zip(rows, positions, strict=True)
        )

    def fixed_batch(self, row: int, count: int) -> Batch:
        """One picture at `count` evenly spaced timesteps, with noise that never changes, for validation."""
        picture = self.table.rows[row]
        mean = self.latents[self.first_view[row]].chunk(2, dim=-3)[0] * self.scaling_factor
        shape = tuple(mean.shape)
        noise = [randomness.normal(shape, 0, "validation", picture.sha256, k) for k in range(count)]
        prompts = [picture.caption] * count
        return Batch(
            latents=mean.expand(count, *shape),
            noise=torch.stack(noise).to(self.device),
            timesteps=((torch.arange(count) + 0.5) * self.num_timesteps / count).long(),
            prompt_embeds=self._stack(self.text_states, prompts),
            input_ids=self._stack(self.token_ids, prompts),
            keys=tuple((0, "validation", picture.sha256, k) for k in range(count)),
            weights=self._weights([int(self.first_view[row])] * count),
        )

    def embed(self, prompts: Sequence[str], text_encoder: Callable | None) -> Tensor:
        """Text states (n, L, D) of prompts that were named when the caches were filled."""
        ids = self._stack(self.token_ids, prompts)
        if text_encoder is not None:
            return text_encoder(ids)[0]
        states = self._stack(self.text_states, prompts)
        assert states is not None
        return states

    def _stack(self, table: Cache | dict[str, Tensor] | None, prompts: Sequence[str]) -> Tensor | None:
        return None if table is None else torch.stack([table[prompt] for prompt in prompts]).to(self.device)
