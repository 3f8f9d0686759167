"""The frames between pictures, all of them at once: timesteps outside, chunks of frames inside.

After DiffMorpher (Zhang et al. 2024, https://arxiv.org/abs/2312.07409), with these differences: the pictures
ride along in every step, so that frames look at the keys and values of that step alone and nothing is stored;
deltas of LoRAs are mixed, one mixture per row; and the pictures' paths are anchored, so that it ends on them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.diffusion.attention import Between
from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.interpolate import adain, bezier, slerp
from lorakit.diffusion.inversion_plan import Solver
from lorakit.diffusion.schedule import Grid, ddim_step
from lorakit.film.config import MorphConfig
from lorakit.ground.chunks import Chunks


@dataclass(frozen=True)
class Ends:
    """E inverted pictures: `trajectory` (n + 1, E, C, h, w) from noise to picture, and their conditions."""

    trajectory: Tensor
    rows: Rows


@dataclass(frozen=True)
class Settings:
    """How frames are made; see the keys of MorphConfig with the same names."""

    guidance_scale: float = 1.0
    attention_share: float = 0.6
    adain: bool = True
    anchor: bool = True
    residual_power: float = 2.0
    solver: Solver = "ddim"

    @classmethod
    def of(cls, cfg: MorphConfig) -> "Settings":
        return cls(**{each.name: getattr(cfg, each.name) for each in fields(cls)})


@dataclass
class State:
    """The latents after `step` steps: `frames` (F, C, h, w) and `ends` (E, C, h, w).

    `residual_ratio` (E,): the norm of what a step misses the picture's path by, over that of the step, in the
    mean of the steps so far; `noise` (E + F, C, h, w): what the last of them evaluated, if the solver asks.
    """

    step: int
    frames: Tensor
    ends: Tensor
    residual_ratio: Tensor
    noise: Tensor | None = None


def frame_rows(ends: Ends, lies: Between, control: Tensor | None = None) -> Rows:
    """What each frame is made under: between its pictures' prompts, and a mixture of their LoRAs.

    Weights are (1 - alpha) w_left + alpha w_right, of deltas: DiffMorpher's eq. 4.
    """
    a, b, alpha = ends.rows[lies.left], ends.rows[lies.right], lies.alpha
    return Rows(
        bezier(a.prompt_embeds, b.prompt_embeds, alpha, control),
        torch.lerp(a.negative_embeds, b.negative_embeds, alpha.to(a.negative_embeds)[:, None, None]),
        torch.lerp(a.weights, b.weights, alpha.to(a.weights)[:, None]),
    )


def start(ends: Ends, lies: Between, settings: Settings) -> State:
    """The frames' noise: on the arc between their pictures' (eq. 5), with their statistics (eqs. 8-10)."""
    noise = ends.trajectory[0]
    a, b, alpha = noise[lies.left], noise[lies.right], lies.alpha
    frames = slerp(a, b, alpha)
    if settings.adain and len(frames):
        frames = adain(frames, a, b, alpha)
    return State(0, frames, noise, torch.zeros(len(noise)))


def denoise(
    denoiser: Denoiser,
    ends: Ends,
    lies: Between,
    rows: Rows,
    grid: Grid,
    settings: Settings,
    chunks: Chunks,
    state: State,
) -> Iterator[State]:
    """Steps of the solver from `state` to the pictures; yields the state after each.

    Anchored, each picture is put back on its own path after every step, and each frame moves by
    (1 - alpha)^p d_left + alpha^p d_right, with d what the pictures' steps missed their paths by. So frames
    near a picture go where it goes, whatever the guidance, the LoRA or the number of steps.

    Args:
        ends: with a trajectory at the nodes of `grid`.
        lies: of each frame, the two ends and alpha; `rows` are its `frame_rows`.
    """
    alpha = lies.alpha.to(state.frames).view(-1, 1, 1, 1)
    left, right = (1 - alpha) ** settings.residual_power, alpha**settings.residual_power

    everything, pictures = join_rows([ends.rows, rows]), len(ends.rows)

    def noise_of(i: int, latents: Tensor, at: slice) -> Tensor:
        shares = denoiser.shared is not None and i < settings.attention_share * len(grid)
        look = _look(lies, pictures, at) if shares else {}
        return denoiser(latents[at], grid.timesteps[i], everything[at], settings.guidance_scale, **look)

    for i in range(state.step, len(grid)):
        latents = torch.cat([state.ends, state.frames])  # pictures first: frames look at them in this pass
        if denoiser.single:  # runs rows one by one, so that chunks would only mix up the recorded halves
            noise = noise_of(i, latents, slice(0, len(latents)))
        else:
            noise = chunks.map(len(latents), partial(noise_of, i, latents))
        along = grid.along(i, noise, state.noise)
        latents = ddim_step(latents, along, grid.alpha_bar[i], grid.alpha_bar[i + 1])
        stepped, frames = latents.tensor_split([pictures])
        moved = (stepped - state.ends).flatten(1).norm(dim=1)
        missed = torch.zeros_like(stepped)
        if settings.anchor:
            missed, stepped = ends.trajectory[i + 1] - stepped, ends.trajectory[i + 1]
        frames = frames + left * missed[lies.left] + right * missed[lies.right]
        ratio = missed.flatten(1).norm(dim=1) / moved.clamp_min(1e-12)
        ratio = state.residual_ratio.to(ratio) + (ratio - state.residual_ratio.to(ratio)) / (i + 1)
        state = State(i + 1, frames, stepped, ratio, noise if grid.solver == "ab2" else None)
        yield state


def _look(lies: Between, pictures: int, at: slice) -> dict[str, Any]:
    """How rows `at` share attention: pictures come first and are recorded, frames look at them."""
    look: dict[str, Any] = {}
    if at.start < pictures:
        look["record"] = "more" if at.start else "new"
    inside = slice(max(at.start - pictures, 0), max(at.stop - pictures, 0))
    if inside.start < inside.stop:
        look["between"] = Between(lies.left[inside], lies.right[inside], lies.alpha[inside])
    return look


def positions_to_rows(
    positions: Sequence[float], pictures: int, device: torch.device | str = "cpu"
) -> tuple[Between, list[int]]:
    """Where frames at positions u of the film lie, and which of them are not pictures themselves.

    Picture k is at u = k; with `pictures` E a position beyond E - 1 lies between the last and the first.

    Returns:
        Between over the frames inside segments, and their indices in `positions`.
    """
    inside = [k for k, u in enumerate(positions) if u != math.floor(u)]
    whole = [math.floor(positions[k]) for k in inside]
    left = torch.tensor([w % pictures for w in whole], dtype=torch.long, device=device)
    alpha = torch.tensor([positions[k] - w for k, w in zip(inside, whole, strict=True)], dtype=torch.float64)
    return Between(left, (left + 1) % pictures, alpha), inside
