"""Noise that lies in the scene and is seen through the camera, so that what is made of it moves with it.

The scene is a plane of fine cells of white noise. A latent pixel is the sum of the cells that it sees over
the root of their number, after the integral noise of Chang et al. 2024 (https://arxiv.org/abs/2504.03072):
each cell is seen by one pixel, so that every frame is white noise, whatever the camera does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.ground.randomness import normal
from lorakit.motion.camera import Pose

FINE = 8
"""Cells to a side of a latent pixel that is seen at scale 1."""


class Scene:
    """The noise of a scene, laid out in tiles as large as a picture.

    Args:
        still: (C, h, w), the noise of the picture at the camera's start, to the bit.
    """

    def __init__(self, still: Tensor, seed: int):
        self.still, self.seed = still, seed
        self.tiles: dict[tuple[int, int], Tensor] = {}

    def seen(self, pose: Pose, factor: int) -> Tensor:
        """(C, h, w) of a camera at `pose`, in pixels of the picture; `factor` pixels make a latent one."""
        channels, height, width = self.still.shape
        unit = factor / FINE  # pixels of a cell
        reach = math.hypot(height, width) * factor / 2 / pose.scale + factor
        left, right, top, bottom = (
            math.floor((centre + side * reach) / unit) for centre in (pose.x, pose.y) for side in (-1, 1)
        )
        cells = self._cells(left, right, top, bottom)  # (C, rows, columns)
        x = (torch.arange(left, right, dtype=torch.float64) + 0.5) * unit - pose.x
        y = (torch.arange(top, bottom, dtype=torch.float64)[:, None] + 0.5) * unit - pose.y
        cos, sin = math.cos(pose.angle) * pose.scale / factor, math.sin(pose.angle) * pose.scale / factor
        column = torch.floor(cos * x + sin * y + width / 2).long()
        row = torch.floor(cos * y - sin * x + height / 2).long()
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        at = (row * width + column)[inside]
        count = torch.bincount(at, minlength=height * width)
        total = torch.zeros(channels, height * width, dtype=torch.float64)
        total.index_add_(1, at, cells[:, inside].double())
        noise = (total / count.clamp(min=1).sqrt()).float().view(channels, height, width)
        empty = (count == 0).view(height, width)  # beyond FINE-fold magnification
        if empty.any():
            place = (pose.x, pose.y, pose.scale, pose.angle)
            noise = torch.where(empty, normal(noise.shape, self.seed, "unseen", *map(repr, place)), noise)
        return noise

    def _cells(self, left: int, right: int, top: int, bottom: int) -> Tensor:
        """The cells of these columns and rows; cell (0, 0) lies right of and below the centre."""
        _, height, width = self.still.shape
        wide, high = width * FINE, height * FINE
        left, right = left + wide // 2, right + wide // 2
        top, bottom = top + high // 2, bottom + high // 2
        columns, rows = (
            range(left // wide, (right - 1) // wide + 1),
            range(top // high, (bottom - 1) // high + 1),
        )
        whole = torch.cat([torch.cat([self._tile(i, j) for j in columns], 2) for i in rows], 1)
        x, y = left - columns[0] * wide, top - rows[0] * high
        return whole[:, y : y + bottom - top, x : x + right - left]

    def _tile(self, i: int, j: int) -> Tensor:
        if (i, j) not in self.tiles:
            channels, height, width = self.still.shape
            cells = normal((channels, height, FINE, width, FINE), self.seed, "scene", i, j)
            if (i, j) == (0, 0):  # white noise whose sum over each latent pixel is known
                cells += (self.still[:, :, None, :, None] / FINE) - cells.mean((2, 4), keepdim=True)
            self.tiles[i, j] = cells.reshape(channels, height * FINE, width * FINE)
        return self.tiles[i, j]


def film_noise(still: Tensor, seed: int, poses: Sequence[Pose], factor: int, share: float) -> Tensor:
    """(F, C, h, w) for the frames of a film.

    Args:
        still: (C, h, w), the noise of a picture with this seed; the first frame has it, at its `share` of the
            variance, if the camera starts at rest.
        share: of the variance that lies in the scene; the rest is each frame's own.
    """
    scene = Scene(still, seed)
    frames = []
    for i, pose in enumerate(poses):
        noise = scene.seen(pose, factor)
        if share < 1:
            own = normal(tuple(still.shape), seed, "frame", i)
            noise = math.sqrt(share) * noise + math.sqrt(1 - share) * own
        frames.append(noise)
    return torch.stack(frames)
