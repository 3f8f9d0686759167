"""One micro-batch, and random numbers for its samples that follow from who they are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ground import randomness

SampleKey = tuple[int, *tuple[int | str, ...]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device but for the timesteps.

    latents        (B, C, h, w)  float32, scaled by the VAE's scaling factor
    noise          (B, C, h, w)  float32, with the noise offset in it
    timesteps      (B,)          int64, on the CPU: coefficients are made there in float64
    prompt_embeds  (B, L, D)     float32, or None while the text encoder is trained
    input_ids      (B, L)        int64, or None when the text states are cached
    keys           B times       seed, and what numbers the sample: its position in the run, or its place in
                                 the validation
    weights        (B, 1, h, w)  float32, of the loss by place, or None where no masks are used

    Of clips latents and noise are (B, F, C, h, w).
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor | None
    input_ids: Tensor | None
    keys: tuple[SampleKey, ...]
    weights: Tensor | None = None

    def text_states(self, text_encoder: Callable | None) -> Tensor:
        """(B, L, D): the cached states, or what `text_encoder` makes of the ids while it is trained."""
        if text_encoder is not None:
            return text_encoder(self.input_ids)[0]
        assert self.prompt_embeds is not None
        return self.prompt_embeds

    def every(self, count: int) -> list[int]:
        """The rows of every `count`-th sample of the run, or of the validation; none is possible."""
        return [row for row, (*_, number) in enumerate(self.keys) if int(number) % count == 0]

    def normal(self, stream: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal noise (B, *shape), on the device; None: of a latent's shape."""
        shape = tuple(self.latents.shape[1:]) if shape is None else shape
        draws = [randomness.normal(shape, seed, stream, *index) for seed, *index in self.keys]
        return torch.stack(draws).to(self.latents.device, non_blocking=True)

    def uniform(self, stream: str) -> list[float]:
        """A number in [0, 1) for each sample."""
        return [randomness.uniform(seed, stream, *index) for seed, *index in self.keys]

    def integers(self, stream: str, high: int) -> list[int]:
        """An integer in [0, high) for each sample."""
        return [randomness.integer(high, seed, stream, *index) for seed, *index in self.keys]
