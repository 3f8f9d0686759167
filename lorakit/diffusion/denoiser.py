"""The U-Net as a function from noisy latents to their noise, with a prompt and LoRA weights for every row."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.diffusion.attention import Between, SharedAttention
from lorakit.diffusion.row_weights import RowMixtures
from lorakit.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Rows:
    """What each of B rows is made under.

    `prompt_embeds` and `negative_embeds` are (B, L, D); `weights` (B, A), of each adapter. With a
    `guidance_scale` g of 1 the negative prompt is not evaluated, else the noise is
    eps_negative + g (eps_prompt - eps_negative) (Ho & Salimans 2022, in the library's convention).
    """

    prompt_embeds: Tensor
    negative_embeds: Tensor
    weights: Tensor

    @classmethod
    def plain(cls, prompt_embeds: Tensor, negative_embeds: Tensor) -> "Rows":
        """Rows that weigh no adapters."""
        return cls(prompt_embeds, negative_embeds, prompt_embeds.new_zeros(len(prompt_embeds), 0))

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: Any) -> "Rows":
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))


def join_rows(rows: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(each, field.name) for each in rows]) for field in fields(Rows)))


class Denoiser:
    """Predicts noise, and counts what that takes.

    Args:
        unet: UNet2DConditionModel with `adapters` loaded and active.
        adapters: names in the order of the columns of Rows.weights.
        shared: the U-Net's self-attention, where frames look at pictures.

    `evaluations` counts U-Net evaluations of one row each; guidance above 1 takes two.
    """

    def __init__(
        self,
        unet: Any,
        schedule: NoiseSchedule,
        adapters: Sequence[str] = (),
        shared: SharedAttention | None = None,
    ):
        self.unet, self.schedule, self.adapters, self.shared = unet, schedule, list(adapters), shared
        self.mixtures = RowMixtures(unet, self.adapters)
        self.evaluations = 0

    @property
    def single(self) -> bool:
        """Whether rows go through the U-Net one by one, as DoRA needs it."""
        return self.mixtures.single

    def __call__(
        self,
        latents: Tensor,
        timestep: int,
        rows: Rows,
        guidance_scale: float = 1.0,
        *,
        record: Literal["no", "new", "more"] = "no",
        between: Between | None = None,
    ) -> Tensor:
        """The noise (B, C, h, w), in the dtype of `latents`.

        Args:
            record: let rows look at these, instead of those recorded before or beside them.
            between: the recorded rows that each row looks at; with `record`, that each of the last rows looks
                at, and the rows before them are recorded.
        """
        guided = guidance_scale != 1.0
        embeds = torch.cat([rows.negative_embeds, rows.prompt_embeds]) if guided else rows.prompt_embeds
        weights = torch.cat([rows.weights, rows.weights]) if guided else rows.weights
        inputs = torch.cat([latents, latents]) if guided else latents
        if between is not None and guided:  # the negative half looks at the negative half that was recorded
            assert self.shared is not None
            half = 0 if record == "new" else self.shared.recorded_rows() // 2
            half += len(latents) - len(between.left) if record != "no" else 0
            between = Between(
                torch.cat([between.left, between.left + half]),
                torch.cat([between.right, between.right + half]),
                torch.cat([between.alpha, between.alpha]),
            )
        output = self._forward(inputs, timestep, embeds, weights, record, 1 + guided, between)
        output = output.to(latents.dtype)
        self.evaluations += len(inputs)
        if guided:
            negative, positive = output.chunk(2)
            output = negative + guidance_scale * (positive - negative)
        return self.schedule.epsilon(output, latents, timestep)

    def _forward(self, inputs, timestep, embeds, weights, record, halves, between) -> Tensor:
        unet = self.unet
        inputs = inputs.to(unet.device, unet.dtype).contiguous(memory_format=torch.channels_last)
        embeds = embeds.to(unet.device, unet.dtype)
        if not self.single:
            with self._attention(record, halves, between), self.mixtures.use(weights.T):
                return unet(inputs, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        each = len(inputs) // halves
        looking = len(between.left) // halves if between is not None else 0
        recorded = each - looking if record != "no" else 0
        outputs = []
        for i in range(len(inputs)):
            at, (half, row) = slice(i, i + 1), divmod(i, each)
            recording, lies = "no", None
            if row < recorded:
                recording = "more" if i and record == "new" else record
            elif between is not None:
                k = half * looking + row - recorded
                lies = Between(between.left[k : k + 1], between.right[k : k + 1], between.alpha[k : k + 1])
            with self._attention(recording, 1, lies), self.mixtures.use(weights[at].T):
                result = unet(inputs[at], timestep, encoder_hidden_states=embeds[at], return_dict=False)
            outputs.append(result[0])
        return torch.cat(outputs)

    def _attention(self, record: str, halves: int, between: Between | None) -> ExitStack:
        stack = ExitStack()
        if self.shared is not None and record != "no":
            stack.enter_context(self.shared.record(halves, more=record == "more"))
        if self.shared is not None and between is not None:
            stack.enter_context(self.shared.use(between))
        return stack
