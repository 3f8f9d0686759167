"""How one picture moves into the next: shift, growth and turn that fit best, and how well they fit.

Gauss-Newton on the difference of the pictures (Baker and Matthews 2004), from coarse to fine, with Cauchy
weights, so that what does not move with the rest counts little.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lorakit.motion.camera import Move

SIDES = (16, 32, 64)
"""Pixels of the longer side at which pictures are compared, one after the other."""
INNER = 0.88
"""Of a picture's width and height is looked at: a margin stands still with its sheet, whatever is painted."""
STEPS = 20
LEAST_SEEN = 0.2
"""Of the picture must be seen in both."""


def moves(frames: Sequence[Image.Image]) -> tuple[list[Move], list[float], list[float]]:
    """The move from each frame to the next; the PSNR in dB with it, and without any."""
    pictures = torch.stack([torch.from_numpy(np.array(f.convert("RGB"))) for f in frames])
    pictures = pictures.permute(0, 3, 1, 2).float() / 255
    found = similarity(pictures[:-1], pictures[1:])
    before, after = (_sized(each, SIDES[-1]) for each in (pictures[:-1], pictures[1:]))
    fitted = _psnr(before, after, _scaled(found, pictures, before))
    still = _psnr(before, after, torch.zeros_like(found))
    return [Move(*row) for row in found.tolist()], fitted, still


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """(N, 4): dx, dy in pixels, log scale, angle of the moves from `before` to `after`, (N, 3, H, W) each."""
    found = torch.zeros(len(before), 4, dtype=torch.float64)
    for side in SIDES:
        a, b = _sized(before, side), _sized(after, side)
        scale = a.shape[-1] / before.shape[-1]
        found = _fit(a, b, found * torch.tensor([scale, scale, 1, 1]))
        found = found / torch.tensor([scale, scale, 1, 1])
    return found


def _fit(before: Tensor, after: Tensor, found: Tensor) -> Tensor:
    """The moves that fit best, from `found` on; in pixels of these pictures."""
    slopes = _slopes(after)
    for _ in range(STEPS):
        x, y = _places(before)
        u, v = _turned(x, y, found)
        there = _look(
            torch.cat([after, *slopes], 1), u + found[:, 0, None, None], v + found[:, 1, None, None]
        )
        seen, gx, gy = there[0].chunk(3, 1)
        rest = (seen - before) * there[1]
        spread = 1.4826 * rest.abs().flatten(1).median(1).values.clamp(min=2e-3)
        weight = there[1] / (1 + (rest / spread.view(-1, 1, 1, 1)) ** 2)
        u, v = u[:, None], v[:, None]
        rows = torch.stack([gx, gy, gx * u + gy * v, gy * u - gx * v], 1).flatten(2)  # (N, 4, 3 H W)
        weighted = rows * weight.flatten(1)[:, None]
        normal = weighted @ rows.transpose(1, 2)
        normal = normal + 1e-4 * torch.diag_embed(normal.diagonal(dim1=1, dim2=2)) + 1e-9 * torch.eye(4)
        step = torch.linalg.solve(normal, weighted @ rest.flatten(1)[..., None])[..., 0]
        most = torch.tensor([before.shape[-1] / 8, before.shape[-1] / 8, 0.1, 0.1], dtype=step.dtype)
        found = found - step.clamp(-most, most)
    return found


def _psnr(before: Tensor, after: Tensor, move: Tensor) -> list[float]:
    """dB between `before` and `after` looked at through the move, where both are seen."""
    x, y = _places(before)
    u, v = _turned(x, y, move)
    seen, inside = _look(after, u + move[:, 0, None, None], v + move[:, 1, None, None])
    error = ((seen - before) ** 2 * inside).flatten(1).sum(1) / (3 * inside.flatten(1).sum(1)).clamp(min=1)
    share = inside.flatten(1).mean(1)
    return [
        -10 * math.log10(max(float(e), 1e-10)) if s >= LEAST_SEEN else 0.0
        for e, s in zip(error, share, strict=True)
    ]


def _scaled(found: Tensor, whole: Tensor, small: Tensor) -> Tensor:
    scale = small.shape[-1] / whole.shape[-1]
    return found * torch.tensor([scale, scale, 1, 1])


def _sized(pictures: Tensor, side: int) -> Tensor:
    """With a longer side of `side` pixels at most, float64."""
    height, width = pictures.shape[-2:]
    factor = min(1.0, side / max(height, width))
    size = (max(4, round(height * factor)), max(4, round(width * factor)))
    return functional.interpolate(pictures, size, mode="bilinear", antialias=True).double()


def _slopes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return across, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _places(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (H, W) of the pixels, from the centre."""
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x.double() - (width - 1) / 2, y.double() - (height - 1) / 2


def _turned(x: Tensor, y: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """Places (N, H, W), grown and turned about the centre."""
    grown = move[:, 2].exp()
    cos, sin = (grown * f(move[:, 3]) for f in (torch.cos, torch.sin))
    cos, sin = cos[:, None, None], sin[:, None, None]
    return cos * x - sin * y, sin * x + cos * y


def _look(pictures: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures at places (N, H, W), and which of their pixels count: inner ones that show inner ones."""
    height, width = pictures.shape[-2:]
    grid = torch.stack([2 * x / (width - 1), 2 * y / (height - 1)], -1)
    own_x, own_y = _places(pictures)
    own = (own_x.abs() <= INNER * width / 2) & (own_y.abs() <= INNER * height / 2)
    inside = ((grid.abs() <= INNER).all(-1) & own)[:, None].double()
    seen = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=True)
    return seen, inside
