"""Imagic (Kawar et al. 2023), a LoRA in place of the whole U-Net: its first stage, and what its third mixes.

A  the target's text states are optimised until the frozen U-Net predicts the picture's noise under them
B  a LoRA is fitted to the picture under these (train_lora.py, prompt_embeds)
C  e = eta e_target + (1 - eta) e_fitted, sampled under the LoRA
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.editing.imagic_plan import BATCH, STEP
from lorakit.ground import randomness
from lorakit.ground.chunks import Chunks
from lorakit.ground.publish import publish_file
from lorakit.weights.tensors import read_tensors, serialize
from lorakit.weights.text_states import STATES

_NAMES = (STATES, "target_embeds", "exp_avg", "exp_avg_sq")
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass
class Embedding:
    """Text states (L, D), float32, on their way from `target` to the picture, after `step` steps of Adam.

    `mean` and `square` are the moments.
    """

    states: Tensor
    target: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0

    @classmethod
    def at_start(cls, target: Tensor) -> "Embedding":
        return cls(target, target, torch.zeros_like(target), torch.zeros_like(target))

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Embedding":
        """Raises what `read_tensors` raises."""
        tensors, metadata = read_tensors(path)
        states, target, mean, square = (tensors[name].to(device) for name in _NAMES)
        return cls(states, target, mean, square, int(metadata[STEP]))

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        values = self.states, self.target, self.mean, self.square
        content = serialize(dict(zip(_NAMES, values, strict=True)), metadata | {STEP: str(self.step)})
        publish_file(path, content)

    def between(self, eta: float) -> Tensor:
        """(1, L, D): at 0 the picture's, at 1 the target's."""
        return ((1 - eta) * self.states + eta * self.target)[None]

    def move(self, gradient: Tensor, learning_rate: float) -> None:
        """A step of Adam."""
        (b1, b2), t = _BETAS, self.step + 1
        self.mean = b1 * self.mean + (1 - b1) * gradient
        self.square = b2 * self.square + (1 - b2) * gradient**2
        change = (self.mean / (1 - b1**t)) / ((self.square / (1 - b2**t)).sqrt() + _EPS)
        self.states, self.step = self.states - learning_rate * change, t


def fit_states(
    unet: Any,
    schedule: NoiseSchedule,
    latents: Tensor,
    embedding: Embedding,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    chunks: Chunks,
) -> Iterator[float]:
    """The loss of each step up to number `steps`, with which `embedding` has moved.

    Args:
        unet: frozen.
        latents: (1, C, h, w), scaled.
        chunks: how many samples of a step go through the U-Net at once.
    """
    while embedding.step < steps:
        numbers = range(BATCH * embedding.step, BATCH * (embedding.step + 1))
        states = embedding.states.detach().requires_grad_()

        def work(part: slice, own=numbers, states=states) -> tuple[float, Tensor]:
            loss = _squares(unet, schedule, latents, states, own[part], seed)
            return loss.item(), torch.autograd.grad(loss, states)[0]

        parts, count = chunks.parts(BATCH, work), BATCH * latents.numel()
        embedding.move(torch.stack([gradient for _, gradient in parts]).sum(0) / count, learning_rate)
        yield sum(loss for loss, _ in parts) / count


def _squares(
    unet: Any, schedule: NoiseSchedule, latents: Tensor, states: Tensor, numbers: range, seed: int
) -> Tensor:
    """The sum of squares of samples, by number; half precision keeps it better than their mean."""
    shape = tuple(latents.shape[1:])
    noise = torch.stack([randomness.normal(shape, seed, "imagic noise", i) for i in numbers]).to(latents)
    timesteps = torch.tensor(
        [randomness.integer(schedule.num_timesteps, seed, "imagic timestep", i) for i in numbers]
    )
    clean = latents.expand(len(noise), -1, -1, -1)
    x_t = schedule.add_noise(clean, noise, timesteps).to(unet.dtype)
    embeds = states.to(unet.dtype).expand(len(noise), -1, -1)
    output = unet(
        x_t.contiguous(memory_format=torch.channels_last),
        timesteps.to(latents.device),
        encoder_hidden_states=embeds,
        return_dict=False,
    )[0]
    return (output.float() - schedule.target(clean, noise, timesteps)).square().sum()
