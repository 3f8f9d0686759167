"""Training objectives: terms that share one forward pass of the U-Net, weighted and added.

The loop knows `Objective` alone. What must be known of a term before torch stands in objective_config.py.
Rules that every term keeps, so that a resumed or divided run stays the run that it was:

- All that it draws comes from the batch (`Batch.normal`, `.uniform`, `.integers`), by streams of its own.
- State moves in `finish_step` alone, once per optimizer step, from means over all samples of all processes.
- The teacher is called with what carries no gradient, and left before backward.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.training.batch import Batch, SampleKey
from lorakit.training.objective_config import KINDS, names_of

Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x_t (B, C, h, w), timesteps (B,) on the device, prompt_embeds (B, L, D) -> the output (B, C, h, w).

Of clips x_t and output are (B, F, C, h, w).
"""
Parts = dict[str, Tensor]
"""Name -> number to log, a scalar: means over the micro-batch."""


@dataclass(frozen=True)
class Models:
    """What terms may evaluate.

    student       the U-Net with its LoRA, maybe wrapped for several processes
    teacher       the U-Net without its LoRA, no gradient
    embed         prompts -> their text states (n, L, D)
    frozen_embed  the same without the text encoder's LoRA; None: it has none
    class_batch   samples that show the class of a subject, by key, with their text states; None: none do
    """

    student: Evaluate
    teacher: Evaluate
    embed: Callable[[Sequence[str]], Tensor]
    schedule: NoiseSchedule
    frozen_embed: Callable[[Sequence[str]], Tensor] | None = None
    class_batch: Callable[[Sequence[SampleKey]], tuple[Batch, Tensor]] | None = None


def as_function(unet: Any) -> Evaluate:
    """A U-Net, wrapped or not, as terms call it."""

    def evaluate(x_t: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        if x_t.ndim == 4:
            return unet(x_t, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        states = prompt_embeds.repeat_interleave(x_t.shape[1], 0)  # (B F, L, D)
        clips = x_t.transpose(1, 2)  # (B, C, F, h, w)
        return unet(clips, timesteps, encoder_hidden_states=states, return_dict=False)[0].transpose(1, 2)

    return evaluate


class Pass:
    """One forward pass that terms share: what is not asked for is not computed.

    Args:
        noise_gradient: terms differentiate by the noise.
        noise_every: of every so many samples one; the others are evaluated apart, at their usual cost.
    """

    def __init__(
        self,
        models: Models,
        batch: Batch,
        prompt_embeds: Tensor,
        noise_gradient: bool = False,
        noise_every: int = 1,
    ):
        self.models, self.batch, self.prompt_embeds = models, batch, prompt_embeds
        self.noise_rows = batch.every(noise_every) if noise_gradient else []
        # A copy, so that the target keeps the plain noise.
        self.noise = batch.noise.detach().clone().requires_grad_() if self.noise_rows else batch.noise

    @cached_property
    def timesteps(self) -> Tensor:
        """(B,), on the device."""
        return self.batch.timesteps.to(self.batch.latents.device)

    @cached_property
    def x_t(self) -> Tensor:
        """(B, C, h, w)"""
        return self.models.schedule.add_noise(self.batch.latents, self.noise, self.batch.timesteps)

    @cached_property
    def prediction(self) -> Tensor:
        """The student's output, (B, C, h, w)."""
        count = len(self.x_t)
        others = [row for row in range(count) if row not in self.noise_rows]
        if not self.noise_rows or not others:
            return self.models.student(self.x_t, self.timesteps, self.prompt_embeds)
        parts = [
            self._evaluated(self.x_t, self.noise_rows),
            self._evaluated(self.x_t.detach(), others),
        ]
        order = [*self.noise_rows, *others]
        return torch.cat(parts)[[order.index(row) for row in range(count)]]

    def _evaluated(self, x_t: Tensor, rows: list[int]) -> Tensor:
        return self.models.student(x_t[rows], self.timesteps[rows], self.prompt_embeds[rows])

    @cached_property
    def target(self) -> Tensor:
        """What the U-Net is asked to predict, (B, C, h, w)."""
        return self.models.schedule.target(self.batch.latents, self.batch.noise, self.batch.timesteps)


class Term:
    """One objective. A subclass takes the whole config: `Term(cfg)`."""

    weight = 1.0
    noise_every = 1
    """Of a term that differentiates by the noise: see Pass."""

    def loss(self, models: Models, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample (B,), and by name what is to be logged of each (B,)."""
        raise NotImplementedError

    def validation(self, models: Models, at: Pass) -> Tensor | None:
        """What judges a LoRA, (B,), without gradient; None: this term has no say in what is best."""
        return self.loss(models, at)[0]

    def finish_step(self, means: Mapping[str, float]) -> None:
        """Move the state by the means of this step's logged parts, by name, over all processes."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; empty: the term has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put a state back, the inverse of `state_dict`."""


class Objective:
    """The terms of a config as one loss.

    Args:
        terms: name in the config -> term.
        noise_gradient: a term differentiates by the noise, so attention takes kernels that can do it twice.
        noise_every: see Pass.
    """

    def __init__(self, terms: dict[str, Term], noise_gradient: bool = False, noise_every: int = 1):
        self.terms, self.noise_gradient, self.noise_every = terms, noise_gradient, noise_every

    def loss(self, models: Models, batch: Batch, prompt_embeds: Tensor) -> tuple[Tensor, Parts]:
        """The mean loss of a micro-batch, and its parts, where there is more than one number to tell."""
        at = Pass(models, batch, prompt_embeds, self.noise_gradient, self.noise_every)
        losses, parts = [], {}
        for name, term in self.terms.items():
            loss, told = term.loss(models, at)
            losses.append(loss * term.weight)
            if len(self.terms) > 1:
                parts[name] = loss.detach().mean()
            parts |= {f"{name}.{part}": value.detach().mean() for part, value in told.items()}
        return sum(losses[1:], losses[0]).mean(), parts

    def validation(self, models: Models, batch: Batch, prompt_embeds: Tensor) -> Tensor:
        """What judges a LoRA, mean over a batch, without gradient."""
        at = Pass(models, batch, prompt_embeds)
        found = [(term.weight, term.validation(models, at)) for term in self.terms.values()]
        judged = [loss * weight for weight, loss in found if loss is not None]
        assert judged, "no objective judges"
        return sum(judged[1:], judged[0]).mean()

    def attention(self) -> contextlib.AbstractContextManager:
        """Around loss and backward: fused attention kernels have no second derivative."""
        return sdpa_kernel(SDPBackend.MATH) if self.noise_gradient else contextlib.nullcontext()

    def finish_step(self, means: Mapping[str, float]) -> None:
        for name, term in self.terms.items():
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in means.items()
                if key.startswith(f"{name}.")
            }
            term.finish_step(own)

    @property
    def has_state(self) -> bool:
        return any(term.state_dict() for term in self.terms.values())

    def state_dict(self) -> dict[str, dict[str, float]]:
        """By name, of the terms that have a state."""
        return {name: state for name, term in self.terms.items() if (state := term.state_dict())}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Raises KeyError where a term's state is missing: going on without it would be another run."""
        for name in self.state_dict():
            self.terms[name].load_state_dict(state[name])


def make_objective(cfg: Any) -> Objective:
    """The objective that a config names."""
    terms = {}
    for name in names_of(cfg.objective):
        module, _, term = KINDS[name].term.rpartition(".")
        terms[name] = getattr(import_module(f"{__package__}.{module}"), term)(cfg)
    twice = [term.noise_every for name, term in terms.items() if KINDS[name].double_backward]
    return Objective(terms, bool(twice), min(twice, default=1))
