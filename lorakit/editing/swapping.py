"""Edits of one picture by its prompts, after it has been inverted.

Latents are (B, C, h, w), scaled; a path is (n + 1, 1, C, h, w) from noise to picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.inversion import edit_anchored, sample
from lorakit.diffusion.schedule import Grid
from lorakit.pictures.images import from_array, to_array


@dataclass(frozen=True)
class Source:
    """A picture as edits start from it: `path`, and `row`, what it was inverted under."""

    path: Tensor
    row: Rows
    grid: Grid

    @property
    def latents(self) -> Tensor:
        """(1, C, h, w)"""
        return self.path[-1]


def swap(
    denoiser: Denoiser,
    source: Source,
    rows: Rows,
    *,
    guidance_scale: float = 1.0,
    start: int = 0,
    where: Tensor | None = None,
) -> Iterator[Tensor]:
    """Each step's latents of the picture under the prompts of `rows` instead of its own.

    The picture rides along in the batch, under the same guidance, and every row is put right by what its step
    misses its path by (`edit_anchored`).

    Args:
        where: (1, 1, h, w), 0 where the picture is kept.
    """
    both = join_rows([source.row, rows])
    alike = (rows.prompt_embeds == source.row.prompt_embeds).flatten(1).all(1)

    def predict(own: Tensor, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        noise = denoiser(torch.cat([own, latents]), timestep, both, guidance_scale)
        # Kernels may round the rows of a batch differently: what is the picture's in all takes its noise.
        same = alike & (latents == own).flatten(1).all(1)
        return noise[:1], torch.where(same.view(-1, 1, 1, 1), noise[:1], noise[1:])

    latents = source.path[start].expand(len(rows), -1, -1, -1)
    return edit_anchored(source.path, source.grid, predict, start=start, latents=latents, where=where)


def redraw(
    denoiser: Denoiser,
    source: Source,
    rows: Rows,
    noise: Tensor,
    *,
    guidance_scale: float = 1.0,
    start: int = 0,
    where: Tensor | None = None,
) -> Iterator[Tensor]:
    """SDEdit (Meng et al. 2022): `noise` laid on the picture up to node `start`, and taken off under `rows`.

    Args:
        noise: (B, C, h, w).
        where: (1, 1, h, w), 0 where the picture is kept: there its latents are noised anew at each node.
    """
    grid = source.grid

    def noised(node: int) -> Tensor:
        a = grid.alpha_bar[node]
        return a**0.5 * source.latents + (1 - a) ** 0.5 * noise

    rest = Grid(grid.timesteps[start:], grid.alpha_bar[start:])
    latents = noised(start)
    for i in range(len(rest)):
        one = Grid(rest.timesteps[i : i + 1], rest.alpha_bar[i : i + 2])
        (latents,) = sample(latents, one, lambda x, t: denoiser(x, t, rows, guidance_scale))
        if where is not None:
            kept = noised(start + i + 1) if i + 1 < len(rest) else source.latents
            latents = torch.where(where > 0, latents, kept)
        yield latents


def with_reach(steps: Iterator[Tensor], path: Tensor) -> tuple[Tensor, Tensor]:
    """The last step's latents, and (B, h, w) in [0, 1] how far each place has been led away from `path`.

    The mean over the steps of the distance, each by that of its farthest place.

    Args:
        steps: those that end at the picture's node.
    """
    latents, shares = path[-1], []
    found = list(steps)
    for latents, own in zip(found, path[len(path) - len(found) :], strict=True):
        distance = (latents - own).square().mean(1).sqrt()
        most = distance.amax((1, 2), keepdim=True)
        shares.append(distance / most.clamp_min(1e-12))
    return latents, torch.stack(shares).mean(0)


def last(steps: Iterator[Tensor]) -> Tensor:
    """The latents of the picture's node."""
    *_, latents = steps
    return latents


def rows_of(source: Rows, prompt_embeds: Tensor) -> Rows:
    """`source`'s conditions (of one row) with these prompts (B, L, D) in place of its own."""
    rows = source[[0] * len(prompt_embeds)]
    return replace(rows, prompt_embeds=prompt_embeds)


# ---- masks ----


def latent_mask(mask: np.ndarray, factor: int, device: torch.device | str) -> Tensor:
    """(1, 1, h, w) from (H, W): 1 in every cell of `factor` pixels a side in which anything may change."""
    cells = max_pool2d(torch.from_numpy(mask)[None, None], factor)
    return (cells > 0).to(device, torch.float32)


def composed(edited: Image.Image, round_trip: Image.Image, mask: np.ndarray, factor: int) -> Image.Image:
    """`edited` where the mask (H, W) is 1, `round_trip` to the bit where it is 0.

    Inside its rim the one fades into the other over about half a cell of the latents.
    """
    levels = Image.fromarray(np.rint(255 * mask).astype(np.uint8))
    inner = levels.filter(ImageFilter.MinFilter(factor // 2 * 2 + 1)).filter(
        ImageFilter.GaussianBlur(factor / 4)
    )
    share = np.minimum(mask, np.asarray(inner, np.float32) / 255)
    return blended(edited, round_trip, share)


def blended(edited: Image.Image, round_trip: Image.Image, share: np.ndarray) -> Image.Image:
    """`edited` where `share` (H, W) is 1, `round_trip` to the bit where it is 0 or both are the same."""
    a, b = to_array(round_trip), to_array(edited)
    return from_array(a + share * (b - a))


def share_of(reach: Tensor, below: float, factor: int) -> np.ndarray:
    """(H, W): 0 where `reach` (h, w) is below half of `below`, 1 from `below` on, a ramp between them."""
    share = (2 * reach / below - 1).clamp(0, 1)[None, None]
    return interpolate(share, scale_factor=factor, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
