"""A picture whose pixels were moved, made whole by the model from a late step of its own path.

What FastDrag (Zhao et al. 2024) does with latents, done with pixels, on the anchored path of edits.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lorakit.diffusion.attention import Between
from lorakit.diffusion.denoiser import Denoiser, join_rows
from lorakit.diffusion.inversion import edit_anchored
from lorakit.editing.swapping import Source
from lorakit.pictures.warping import Way, exchange


def moved_latents(
    source: Source,
    moved: Tensor,
    start: int,
    ways: Sequence[Way],
    radius: float,
    noise: Literal["moved", "own"] = "moved",
    where: Tensor | None = None,
) -> Tensor:
    """The latents (1, C, h, w) of node `start`: those of the moved picture with the picture's noise.

    z' = z* + sqrt(a) (x' - x) + sqrt(1 - a) (e' - e), with e the noise of z* and e' the same moved along.

    Args:
        moved: x', latents of the moved picture.
        ways, radius: of what was moved, in cells of the latents.
        where: (1, 1, h, w), 0 where the picture is kept.
    """
    a, path, clean = source.grid.alpha_bar[start], source.path[start], source.latents
    change = a**0.5 * (moved - clean)
    if noise == "moved":
        own = (path - a**0.5 * clean) / (1 - a) ** 0.5
        values = own[0].permute(1, 2, 0).cpu().numpy()
        along = torch.from_numpy(exchange(values, ways, radius)).permute(2, 0, 1)[None].to(own)
        change = change + (1 - a) ** 0.5 * (along - own)
    return path + (change if where is None else where * change)


def heal(
    denoiser: Denoiser,
    source: Source,
    latents: Tensor,
    *,
    start: int,
    guidance_scale: float = 1.0,
    reference_attention: bool = True,
    where: Tensor | None = None,
) -> Iterator[Tensor]:
    """Each step's latents of the result, from those of node `start`; the picture's own lead to the picture.

    Args:
        reference_attention: the result looks at keys and values of the picture, which rides in its batch;
            `denoiser` has shared attention then.
        where: (1, 1, h, w), 0 where the picture is kept.
    """
    both, none = join_rows([source.row, source.row]), torch.zeros(1, dtype=torch.long)
    between = Between(none, none, torch.zeros(1)) if reference_attention else None

    def predict(own: Tensor, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        noise = denoiser(
            torch.cat([own, latents]),
            timestep,
            both,
            guidance_scale,
            record="new" if between else "no",
            between=between,
        )
        # Kernels may round the rows of a batch differently: what is the picture's takes its noise.
        return noise[:1], noise[:1] if torch.equal(own, latents) else noise[1:]

    return edit_anchored(source.path, source.grid, predict, start=start, latents=latents, where=where)
