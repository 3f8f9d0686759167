"""DragDiffusion (Shi et al. 2024, https://arxiv.org/abs/2306.14435): latents whose features move along ways.

Features are (1, C, h, w). Points are (x, y) in cells of a grid, (width, height), that lies over the whole
feature map, which may be coarser; the middle of the first cell is (0, 0).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from lorakit.ground.errors import DivergedError

Place = tuple[float, float]
NEAR = 2.0
"""Cells from its target at which a handle has arrived."""
Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Latents -> their features, and what the mask holds fast; gradients flow through both."""


@dataclass(frozen=True)
class Following:
    """How handles are moved, and found again."""

    grid: tuple[int, int]
    motion_radius: int = 1
    track_radius: int = 3
    iterations: int = 60
    learning_rate: float = 0.03
    mask_weight: float = 0.1


@dataclass(frozen=True)
class Pull:
    """Where the handles are found under these latents, and whether all of them have arrived."""

    latents: Tensor
    handles: tuple[Place, ...]
    arrived: bool


def drag_latents(
    look: Look,
    latents: Tensor,
    ways: Sequence[tuple[Place, Place]],
    how: Following,
    outside: Tensor | None = None,
) -> Iterator[Pull]:
    """Pulls the features of each handle step by step to its target; the last has arrived, or is that of the
    last iteration.

    Args:
        latents: (1, C, h, w), where the pull begins.
        outside: (1, 1, h, w), 1 where what `look` returns second shall stay; None: nowhere.

    Raises:
        DivergedError: the loss is not finite.
    """
    with torch.no_grad():
        first, held = look(latents)
    handles, targets = [start for start, _ in ways], [end for _, end in ways]
    patterns = read(first, torch.tensor(handles), how.grid)  # (n, C)
    latents = latents.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=how.learning_rate)
    for i in range(how.iterations + 1):
        with torch.set_grad_enabled(i < how.iterations):
            features, free = look(latents)
            if i:
                handles = [follow(features, *each, how) for each in zip(patterns, handles, strict=True)]
            arrived = all(math.dist(*each) < NEAR for each in zip(handles, targets, strict=True))
            yield Pull(latents.detach().clone(), tuple(handles), arrived)
            if arrived or i == how.iterations:
                return
            loss = motion_loss(features, handles, targets, how)
            if outside is not None:
                loss = loss + how.mask_weight * ((free - held) * outside).abs().sum()
        if not torch.isfinite(loss):
            raise DivergedError("the features are no longer numbers; lower learning_rate")
        (latents.grad,) = torch.autograd.grad(loss, latents)
        optimizer.step()


def motion_loss(
    features: Tensor, handles: Sequence[Place], targets: Sequence[Place], how: Following
) -> Tensor:
    """Sum over patches of |F(q + d) - F(q)|, q about a handle and d a step of one cell towards its target."""
    total = features.new_zeros(())
    for handle, target in zip(handles, targets, strict=True):
        length = math.dist(handle, target)
        if length < NEAR:
            continue
        patch = square(handle, how.motion_radius)
        step = torch.tensor([(b - a) / length for a, b in zip(handle, target, strict=True)])
        here = read(features.detach(), patch, how.grid)
        there = read(features, patch + step, how.grid)
        total = total + len(patch) * (there - here).abs().mean()
    return total


def follow(features: Tensor, pattern: Tensor, handle: Place, how: Following) -> Place:
    """The cell about the handle whose features are most like `pattern` (C,)."""
    cells = square(handle, how.track_radius)
    cells = torch.minimum(cells.clamp(min=0), torch.tensor(how.grid, dtype=cells.dtype) - 1)
    distances = (read(features.detach(), cells, how.grid) - pattern).abs().sum(1)
    x, y = cells[int(distances.argmin())].tolist()
    return x, y


def square(centre: Place, radius: int) -> Tensor:
    """((2 r + 1)^2, 2): the places about one, row by row."""
    offsets = torch.arange(-radius, radius + 1.0)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    return torch.stack([x + centre[0], y + centre[1]], dim=-1).flatten(0, 1)


def read(features: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, C) at places (n, 2), bilinear: what an enlarged map would hold there, without enlarging it."""
    at = (2 * places + 1) / torch.tensor(grid) - 1
    found = grid_sample(
        features, at.to(features)[None, None], padding_mode="border", align_corners=False
    )  # (1, C, 1, n)
    return found[0, :, 0].T
