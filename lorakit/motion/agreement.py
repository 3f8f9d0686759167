"""Frames that agree about the scene that they show, while they are denoised.

What each frame expects of the clean scene is moved by the camera into every frame near it, and averaged
there, so that all see one scene (after MultiDiffusion, Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113,
and SyncTweedies, Kim et al. 2024, https://arxiv.org/abs/2403.14370). Frames near in time count more.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from lorakit.motion.camera import Move, Pose, between

DEVIATIONS = 2.5
"""How far frames take part, in units of the reach."""


def seen_at(shape: tuple[int, int], move: Move, unit: float) -> Tensor:
    """Where each cell lies after a move, (h, w, 2): x and y, -1 and 1 at the centres of the outermost cells.

    Args:
        unit: pixels of a cell's side.
    """
    height, width = shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    grown = math.exp(move.log_scale)
    cos, sin = grown * math.cos(move.angle), grown * math.sin(move.angle)
    u, v = cos * x - sin * y + move.dx / unit, sin * x + cos * y + move.dy / unit
    return torch.stack([2 * u / (width - 1), 2 * v / (height - 1)], -1)


class Agreement:
    """Averages latents (F, C, h, w) in the scene.

    Args:
        poses: of the frames, in pixels of the picture; `factor` pixels make a latent one.
        reach: deviation in frames of the weights.
    """

    def __init__(self, poses: Sequence[Pose], shape: tuple[int, int], factor: int, reach: float, loop: bool):
        self.near: list[tuple[list[int], Tensor, Tensor]] = []
        for i, here in enumerate(poses):
            js, grids, weights = [], [], []
            for j, there in enumerate(poses):
                apart = abs(i - j)
                apart = min(apart, len(poses) - apart) if loop else apart
                if apart > DEVIATIONS * reach:
                    continue
                grid = seen_at(shape, between(here, there), factor)
                inside = (grid.abs() <= 1 + 1e-6).all(-1).float()
                js.append(j)
                grids.append(grid)
                weights.append(inside * math.exp(-0.5 * (apart / reach) ** 2))
            self.near.append((js, torch.stack(grids), torch.stack(weights)))

    def __call__(self, latents: Tensor) -> Tensor:
        """Each frame as it and its neighbours see it."""
        means = []
        for i, (js, grids, weights) in enumerate(self.near):
            grids, weights = grids.to(latents), weights.to(latents)[:, None]
            seen = grid_sample(latents[js], grids, "bicubic", "border", align_corners=True)
            seen[js.index(i)] = latents[i]  # to the bit
            means.append((seen * weights).sum(0) / weights.sum(0))
        return torch.stack(means)
