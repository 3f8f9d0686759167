"""The frames of a film, denoised together: with a motion adapter or without, under a camera, resumable.

Latents are (F, C, h, w), float32; embeddings (F, L, D), a row for each frame.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lorakit.diffusion.inversion import invert
from lorakit.diffusion.models import Base
from lorakit.diffusion.schedule import Grid
from lorakit.ground.chunks import Chunks
from lorakit.ground.errors import UserError
from lorakit.ground.publish import publish_file
from lorakit.motion.agreement import Agreement
from lorakit.motion.animate_plan import AnimatePlan
from lorakit.motion.camera import moments
from lorakit.motion.carried_noise import film_noise
from lorakit.motion.shown import REST, Shown, seen_of
from lorakit.sampling.encoding import PromptEncoder
from lorakit.sampling.prompts import lora_files
from lorakit.sampling.samplers import make_scheduler, picture_noise
from lorakit.weights.motion_adapter import MotionInfo
from lorakit.weights.part_files import BaseError, read_places
from lorakit.weights.tensors import read_tensors, serialize

SAVE_SECONDS = 60.0
"""Between states of a film that takes long."""


def inflate(base: Base, info: MotionInfo) -> None:
    """Put a motion adapter into the base's U-Net; LoRAs are loaded after that.

    Raises:
        BaseError: its tensors do not fit its config.
    """
    from diffusers import MotionAdapter, UNetMotionModel

    groups = base.info.configs["unet"]["norm_num_groups"]  # those of the U-Net count, whatever it says
    adapter = MotionAdapter(**(dict(info.config) | {"motion_norm_num_groups": groups}))
    tensors = dict(read_places(info.places))
    own = {name for name in adapter.state_dict() if "pos_embed" not in name}
    if lost := sorted(own - tensors.keys()):
        raise BaseError(f"{info.name}: lacks {len(lost)} weights, such as {lost[0]}; fetch it again")
    try:
        adapter.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise BaseError(
            f"{info.name}: does not fit its config: {str(error).splitlines()[-1].strip()}"
        ) from None
    unet: Any = UNetMotionModel.from_unet2d(base.unet, adapter)
    base.drop("unet")
    base.unet = unet.requires_grad_(False).eval().to(base.device, memory_format=torch.channels_last)


def mixed_prompts(embeds: Tensor, frames: int, loop: bool) -> Tensor:
    """(F, L, D) of prompts (K, L, D) that hold at moments spread evenly over the film."""
    rows = []
    for place in moments(len(embeds), frames, loop) if len(embeds) > 1 else [0.0] * frames:
        left = min(int(place), len(embeds) - 1)
        right = (left + 1) % len(embeds) if loop else min(left + 1, len(embeds) - 1)
        rows.append(torch.lerp(embeds[left], embeds[right], place - left))
    return torch.stack(rows)


def scene_noise(plan: AnimatePlan, base: Base, shown: Shown | None = None) -> Tensor:
    """(F, C, h, w): what the film begins with.

    Its first frame, at rest, begins as a picture of this seed does, or as the one that it is does.
    """
    still = shown.path[0] if shown else picture_noise(base, [plan.cfg.seed], plan.shape)[0]
    return film_noise(
        still.float().cpu(), plan.cfg.seed, plan.poses, base.info.vae_factor, plan.cfg.scene_share
    )


def open_studio(plan: AnimatePlan, base: Base) -> "Studio":
    """What makes the film of a plan, with the LoRAs that are in the base by now."""
    cfg = plan.cfg
    name, _, guidance_scale = cfg.sampler()
    encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs, lora_files([cfg]))
    embeds, negative = encoder.encode(cfg.prompts(), cfg.negative_prompt)
    agreement, factor = None, base.info.vae_factor
    if cfg.agreement:
        size = plan.shape[1] // factor, plan.shape[0] // factor
        agreement = Agreement(plan.poses, size, factor, cfg.agreement_reach, cfg.loop), cfg.agreement
    return Studio(
        base,
        make_scheduler(base, name),
        mixed_prompts(embeds, cfg.frames, cfg.loop),
        negative,
        guidance_scale,
        wide=plan.wide,
        agreement=agreement,
        batch_size=cfg.batch_size,
    )


@torch.no_grad()
def put_in_picture(plan: AnimatePlan, studio: "Studio") -> None:
    """Let the film start from the picture of its config: invert it, and see what frames see of it."""
    cfg, base = plan.cfg, studio.base
    assert cfg.image
    pixels, inside = seen_of(cfg.image, plan.shape, plan.poses)
    views = torch.cat([base.mean_latents(view[None]) for view in pixels])
    cells = -max_pool2d(-inside, base.info.vae_factor).to(views)
    grid = studio.grid(cfg.sampler()[1])
    path = torch.cat([views[:1], *invert(views[:1], grid, studio.unguided)][::-1])
    embeds = studio.embeds.flatten(1)
    same = [i for i, pose in enumerate(plan.poses) if pose == REST and torch.equal(embeds[i], embeds[0])]
    studio.shown = Shown(path, grid, plan.poses, views, cells, same, base.info.vae_factor)


class Studio:
    """What denoises the frames of one film.

    Args:
        scheduler: a sampler of `make_scheduler` that draws no noise on its way.
        negative: (1, L, D); of no effect at guidance 1.
        wide: windows of frames with weights, where a motion adapter looks along them; None: frames alone.
        agreement: and the share of the steps in which it takes part.
    """

    def __init__(
        self,
        base: Base,
        scheduler: Any,
        embeds: Tensor,
        negative: Tensor,
        guidance_scale: float,
        *,
        wide: Sequence[Sequence[tuple[int, float]]] | None,
        agreement: tuple[Agreement, float] | None,
        batch_size: int,
    ):
        self.base, self.scheduler, self.guidance_scale = base, scheduler, guidance_scale
        self.embeds, self.negative = embeds, negative.expand(len(embeds), -1, -1)
        self.wide, self.agreement, self.chunks = wide, agreement, Chunks(batch_size)
        self.schedule = base.noise_schedule()
        self.shown: Shown | None = None
        self.evaluations = 0

    def grid(self, steps: int) -> Grid:
        """The sampler's own; ddim's, on which a picture can be inverted."""
        self.scheduler.set_timesteps(steps)
        timesteps = tuple(int(t) for t in self.scheduler.timesteps)
        levels = [float(self.scheduler.alphas_cumprod[t]) for t in timesteps]
        return Grid(timesteps, (*levels, float(self.scheduler.final_alpha_cumprod)))

    def unguided(self, latents: Tensor, timestep: int) -> Tensor:
        """The noise that the U-Net finds in the first frame's latents (1, C, h, w) under its prompt."""
        output = self._unet(latents, torch.tensor(timestep, device=latents.device), self.embeds[:1], 1)
        self.evaluations += 1
        return self.schedule.epsilon(output, latents, timestep)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        steps: int,
        step: Callable[[int], None] = lambda _: None,
        kept: tuple[Path, str] | None = None,
    ) -> Tensor:
        """The film's latents.

        Args:
            step: is called with the number of evaluations of each step, and may raise to stop.
            kept: the file with which an interrupted film goes on, and whose it is; with ddim alone, for
                other samplers have a memory and begin anew.
        """
        self.scheduler.set_timesteps(steps, device=self.base.device)
        timesteps = self.scheduler.timesteps
        kept = kept if type(self.scheduler).__name__ == "DDIMScheduler" else None
        state = _load(*kept) if kept else None
        latents, first = state or (noise * self.scheduler.init_noise_sigma, 0)
        latents, saved = latents.to(self.base.device), time.monotonic()
        if self.shown:
            self.shown.put_back(first, latents)
        for i in range(first, len(timesteps)):
            before = self.evaluations
            inputs = self.scheduler.scale_model_input(latents, timesteps[i])
            output = self._guided(inputs, timesteps[i])
            agreeing = self.agreement is not None and i < self.agreement[1] * len(timesteps)
            if agreeing or self.shown:
                output = self._put_right(i, inputs, output, int(timesteps[i]), agreeing)
            latents = self.scheduler.step(output, timesteps[i], latents, return_dict=False)[0]
            if self.shown:
                self.shown.put_back(i + 1, latents)
            try:
                step(self.evaluations - before)
            except UserError:  # a signal: nothing is lost
                if kept:
                    _save(*kept, latents, i + 1)
                raise
            if kept and time.monotonic() - saved > SAVE_SECONDS:
                _save(*kept, latents, i + 1)
                saved = time.monotonic()
        return latents.cpu()

    def _guided(self, inputs: Tensor, timestep: Tensor) -> Tensor:
        """What the U-Net says of every frame, (F, C, h, w), at this guidance (see denoiser.Rows)."""
        halves = 1 + (self.guidance_scale != 1)

        def rows(at: Any) -> Tensor:
            embeds = [self.negative[at], self.embeds[at]][2 - halves :]
            outputs = self._unet(torch.cat([inputs[at]] * halves), timestep, torch.cat(embeds), halves)
            self.evaluations += len(outputs)
            if halves == 1:
                return outputs
            negative, positive = outputs.chunk(2)
            return negative + self.guidance_scale * (positive - negative)

        if self.wide is None:
            return torch.cat(self.chunks.parts(len(inputs), rows))
        total, weights = torch.zeros_like(inputs), torch.zeros(len(inputs), 1, 1, 1).to(inputs)
        for window in self.wide:
            at, own = zip(*window, strict=True)
            weight = torch.tensor(own).view(-1, 1, 1, 1).to(inputs)
            total.index_add_(0, torch.tensor(at, device=inputs.device), weight * rows(list(at)))
            weights.index_add_(0, torch.tensor(at, device=inputs.device), weight)
        return total / weights

    def _unet(self, inputs: Tensor, timestep: Tensor, embeds: Tensor, halves: int) -> Tensor:
        unet = self.base.unet
        inputs, embeds = inputs.to(unet.dtype), embeds.to(unet.device, unet.dtype)
        if self.wide is None:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            return unet(inputs, timestep, encoder_hidden_states=embeds, return_dict=False)[0].float()
        clips = inputs.unflatten(0, (halves, -1)).transpose(1, 2)  # (halves, C, F, h, w)
        output = unet(clips, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        return output.transpose(1, 2).flatten(0, 1).float()

    def _put_right(self, i: int, inputs: Tensor, output: Tensor, timestep: int, agreeing: bool) -> Tensor:
        """The output of which x_0 is what the frames agree on, and what is known of them."""
        at = torch.full((len(inputs),), timestep)
        x_0 = self.schedule.predicted(output, inputs, at)[0]
        if agreeing and self.agreement:
            x_0 = self.agreement[0](x_0)
        if self.shown:
            x_0 = self.shown(i, x_0, agreeing)
        if self.schedule.prediction_type == "sample":
            return x_0
        signal, sigma = self.schedule.at(at, inputs)
        eps = (inputs - signal * x_0) / sigma
        return eps if self.schedule.prediction_type == "epsilon" else signal * eps - sigma * x_0


def _save(path: Path, key: str, latents: Tensor, step: int) -> None:
    publish_file(path, serialize({"latents": latents.cpu()}, {"step": str(step), "key": key}))


def _load(path: Path, key: str) -> tuple[Tensor, int] | None:
    """Latents and the steps that they have behind them; None where there are none of this film."""
    try:
        tensors, told = read_tensors(path) if path.exists() else ({}, {})
        return (tensors["latents"], int(told["step"])) if told.get("key") == key else None
    except (UserError, KeyError, ValueError):  # damaged: the film starts anew
        return None
