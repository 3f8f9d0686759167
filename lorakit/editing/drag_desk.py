"""A picture on the desk, and drags of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.attention import SharedAttention
from lorakit.diffusion.denoiser import Rows
from lorakit.diffusion.features import watch
from lorakit.diffusion.frozen import keep_less
from lorakit.diffusion.paths import decode_picture
from lorakit.diffusion.schedule import ddim_step
from lorakit.editing.desk import Desk
from lorakit.editing.drag_config import DragConfig
from lorakit.editing.drag_plan import GRID, DragPlan, holds_outside
from lorakit.editing.drag_report import Drag, Found
from lorakit.editing.dragging import Following, drag_latents
from lorakit.editing.healing import heal, moved_latents
from lorakit.editing.swapping import Source, last
from lorakit.pictures.images import to_array
from lorakit.pictures.matching import find_again
from lorakit.pictures.warping import Array, Point, move, stretch

SMALLEST = 3
"""Pixels to the side of a handle that are looked for in the result, at least."""


@dataclass
class DragDesk(Desk):
    """Everything that the drags of one picture share."""

    cfg: DragConfig
    plan: DragPlan

    def __post_init__(self) -> None:
        super().__post_init__()
        self.denoiser.shared = SharedAttention(self.base.unet, "kv")
        if self.base.info.is_large:
            keep_less(self.base.unet)

    def drag(self, cell: DragConfig) -> Drag:
        """What a resolved cell of the grid asks for."""
        loras = (*cell.all_loras(), *cell.prompt_loras())
        self.stack.use(loras)
        embeds, negative = self.encoder.encode([cell.prompt], cell.negative_prompt)
        source = self._source(cell, Rows.plain(embeds.float(), negative.float()), loras)
        begun = time.perf_counter()
        latents, track, stopped = self.started(cell, source)
        image = self._finished(self.healed(cell, source, latents, self.where))
        seconds = time.perf_counter() - begun
        return Drag(image, track, stopped, self.look_for(cell, image, track[-1]), seconds)

    def started(self, cell: DragConfig, source: Source) -> tuple[Tensor, list[tuple[Point, ...]], str]:
        """The latents from which the result is sampled, the track of the handles, and why it ends."""
        if cell.method == "warp":
            latents = self._warped(cell, source)
            ends = [tuple(handle for handle, _ in self.plan.ways), tuple(end for _, end in self.plan.ways)]
            return latents, ends, "the pixels were moved"
        return self._pulled(cell, source)

    @torch.no_grad()
    def healed(self, cell: DragConfig, source: Source, latents: Tensor, where: Tensor | None) -> Image.Image:
        """The picture that these latents lead to.

        Args:
            where: (1, 1, h, w), 0 where the picture's own latents are kept; None: nowhere.
        """
        steps = heal(
            self.denoiser,
            source,
            latents,
            start=cell.first_node(),
            guidance_scale=cell.sampler()[2],
            reference_attention=cell.reference_attention,
            where=where,
        )
        return decode_picture(self.base, last(steps)[0])

    def moved_pixels(self, cell: DragConfig) -> Array:
        """(H, W, 3) in [-1, 1]: the picture with its things moved, and no model at work."""
        inside = self.plan.inside
        if cell.kind == "stretch":
            return stretch(self._pixels, self.plan.ways, inside)
        return move(self._pixels, self.plan.ways, self.plan.radius(cell), inside)

    def look_for(self, cell: DragConfig, image: Image.Image, tracked: Sequence[Point]) -> list[Found]:
        """Where the picture shows what was about each handle, or what the moved pixels have at its target."""
        after, radius = _pixels_of(image), max(SMALLEST, round(self.plan.radius(cell)))
        moved = cell.method == "warp"
        before, found = self.moved_pixels(cell) if moved else self._pixels, []
        for (handle, target), place in zip(self.plan.ways, tracked, strict=True):
            seen, likeness = find_again(after, before, target if moved else handle, radius, self.plan.inside)
            found.append(Found(place, seen, likeness))
        return found

    @cached_property
    def _pixels(self) -> Array:
        return _pixels_of(self.picture)

    @torch.no_grad()
    def _warped(self, cell: DragConfig, source: Source) -> Tensor:
        factor, pixels = self.base.info.vae_factor, self.moved_pixels(cell)
        moved = self.base.mean_latents(torch.from_numpy(pixels.transpose(2, 0, 1))[None])
        ways = [((a / factor, b / factor), (c / factor, d / factor)) for (a, b), (c, d) in self.plan.ways]
        radius = self.plan.radius(cell) / factor
        noise = cell.noise if cell.kind == "move" else "own"  # what is stretched leaves no place of its own
        return moved_latents(source, moved, cell.first_node(), ways, radius, noise, self.where)

    def _pulled(self, cell: DragConfig, source: Source) -> tuple[Tensor, list[tuple[Point, ...]], str]:
        start, outside = cell.first_node(), None
        timestep, levels = source.grid.timesteps[start], source.grid.alpha_bar[start : start + 2]
        if self.where is not None and holds_outside(cell, self.plan):
            outside = 1 - self.where

        def look(latents: Tensor) -> tuple[Tensor, Tensor]:
            after = latents
            with watch(self.base.unet, cell.feature_block, stop=outside is None) as seen:
                after = ddim_step(latents, self.denoiser(latents, timestep, source.row), *levels)
            return seen[0].float(), after

        width, height = self.plan.shape
        keys = ("motion_radius", "track_radius", "iterations", "learning_rate", "mask_weight")
        how = Following((width // GRID, height // GRID), **{key: getattr(cell, key) for key in keys})
        ways = [(_cell(handle), _cell(target)) for handle, target in self.plan.ways]
        pulls = list(drag_latents(look, source.path[start], ways, how, outside))
        track = [tuple(map(_pixel, pull.handles)) for pull in pulls]
        last, count = pulls[-1], len(pulls) - 1
        stopped = f"{'every handle arrived after' if last.arrived else 'the handles had'} {count} iterations"
        return last.latents, track, stopped


def _pixels_of(image: Image.Image) -> Array:
    return np.ascontiguousarray(to_array(image).transpose(1, 2, 0))


def _cell(point: Point) -> Point:
    """The cell of the feature grid that holds a pixel's place."""
    return float(int(point[0] / GRID)), float(int(point[1] / GRID))


def _pixel(place: Point) -> Point:
    """The middle of such a cell."""
    return (place[0] + 0.5) * GRID, (place[1] + 0.5) * GRID
