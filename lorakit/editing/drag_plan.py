"""What drag.py will do, worked out from its config and from files' headers. No torch here."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from lorakit.diffusion.inversion_plan import inversion_evaluations
from lorakit.editing.drag_config import DragConfig
from lorakit.editing.edit_plan import EditPlan, lora_notes
from lorakit.ground.errors import UserError
from lorakit.pictures.images import image_size
from lorakit.pictures.painted import read_mask
from lorakit.pictures.warping import Point, Way, distance_to_edge
from lorakit.sampling.config import check_size, shape_of
from lorakit.sampling.fitting import missing_loras
from lorakit.sampling.forecast import backward_bytes, memory_lines, model_lines
from lorakit.sampling.prompts import lora_files, text_notes
from lorakit.weights.base import BaseInfo, inspect_base

GRID = 2
"""Pixels to a cell of the grid on which features are followed: half the picture, as published."""


@dataclass(frozen=True)
class View:
    """How a picture of `size` is seen at `shape`, (width, height) both: scaled, then cut in the middle."""

    size: tuple[int, int]
    shape: tuple[int, int]

    @property
    def scale(self) -> float:
        return max(seen / own for seen, own in zip(self.shape, self.size, strict=True))

    def seen(self, point: Point) -> Point:
        """A place of the picture, in pixels of what is seen."""
        x, y = (p * self.scale - cut for p, cut in zip(point, self._cut(), strict=True))
        return x, y

    def own(self, point: Point) -> Point:
        """The other way round."""
        x, y = ((p + cut) / self.scale for p, cut in zip(point, self._cut(), strict=True))
        return x, y

    def _cut(self) -> Iterator[int]:
        for own, seen in zip(self.size, self.shape, strict=True):
            yield round((round(own * self.scale) - seen) / 2)


@dataclass(frozen=True)
class DragPlan(EditPlan):
    """`ways` are those of the config as they are seen at `shape`."""

    view: View
    ways: tuple[Way, ...]

    @property
    def inside(self) -> np.ndarray:
        """(H, W) bool: where anything may change."""
        return np.ones(self.shape[::-1], bool) if self.mask is None else self.mask >= 0.5

    def radius(self, cell: DragConfig) -> float:
        """Of the thing about a handle, as it is seen."""
        if cell.radius is not None:
            return cell.radius * self.view.scale
        if self.mask is None:
            return min(self.shape) / 16
        edge = distance_to_edge(self.inside)
        return max(1.0, 2 / 3 * min(float(edge[int(y), int(x)]) for (x, y), _ in self.ways))


def make_drag_plan(cfg: DragConfig, base: BaseInfo | None = None) -> DragPlan:
    """Check base, picture, mask, points and LoRA files.

    Args:
        base: what is known of the base once it is loaded; None: what its files tell.

    Raises:
        UserError: what is missing, unreadable or does not fit together; names the key and the remedy.
    """
    base = base or inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_size(cfg, base)
    view = View(image_size(cfg.image), shape_of(cfg, base, cfg.image))
    notes = [*base.notes]
    if view.size != view.shape:
        (own, seen) = ("x".join(map(str, sides)) for sides in (view.size, view.shape))
        notes.append(f"{cfg.image} is {own}, dragged at {seen}")
    mask = read_mask(cfg.mask, cfg.image, view.shape) if cfg.mask else None
    if mask is None:
        notes.append("mask is null: everything may change; `--page PICTURE` paints one")
    missing = missing_loras([cfg.lora] if cfg.lora else [], cfg.train_if_missing, cfg.fit_config, "lora=null")
    ways = tuple((view.seen(handle), view.seen(target)) for handle, target in cfg.points)
    plan = DragPlan(base, view.shape, missing, (), mask, (), view, ways)
    _check_points(cfg, plan)
    for _, cell in cfg.numbered_cells():
        _check_block(cell, base)
        notes += [*lora_notes(cell, missing), *_cell_notes(cell.resolved()[0], plan)]
    texts = [(c.prompt, "") for _, c in cfg.numbered_cells()] + [(cfg.negative_prompt, "negative_prompt")]
    loras = lora_files(cell for _, cell in cfg.numbered_cells())
    notes += text_notes(texts, cfg.prompt_syntax, cfg.embedding_dirs, base, loras)
    return replace(plan, notes=tuple(dict.fromkeys(notes)))


def _check_block(cell: DragConfig, base: BaseInfo) -> None:
    """Whether there is the block whose features are followed. Raises UserError: there is not."""
    count = len(base.configs.get("unet", {}).get("up_block_types", ()))
    if count and not -count <= cell.feature_block < count:
        raise UserError(
            f"feature_block {cell.feature_block}: this U-Net has {count} up blocks, {-count} to {count - 1}; "
            "-2 is usual"
        )


def _check_points(cfg: DragConfig, plan: DragPlan) -> None:
    """Whether each handle and each target is somewhere where it can be moved.

    Raises:
        UserError: there are none, or one is outside of the picture or of the mask.
    """
    if not cfg.points:
        raise UserError(
            f"points: there are none; python drag.py --page {cfg.image} points with the mouse, or give "
            "points='[[[x0, y0], [x1, y1]]]'"
        )
    (width, height), (wide, high) = plan.view.size, plan.shape
    for number, way in enumerate(cfg.points):
        for name, (x, y), (u, v) in zip(("handle", "target"), way, plan.ways[number], strict=True):
            here = f"points: the {name} of way {number}, [{x:g}, {y:g}],"
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"{here} is outside of {cfg.image}, which is {width}x{height}; move it inside"
                )
            if not (0 <= u < wide and 0 <= v < high):
                raise UserError(
                    f"{here} is cut away where {cfg.image} is seen at {wide}x{high}; set width and height "
                    "nearer to its aspect, or move it inside"
                )
            if not plan.inside[int(v), int(u)]:
                raise UserError(f"{here} is outside of the mask; paint the mask over it, or set mask=null")


def _cell_notes(cell: DragConfig, plan: DragPlan) -> Iterator[str]:
    """What a user should know of one resolved cell.

    Raises:
        UserError: no step is left, or two targets overlap.
    """
    steps, first = cell.sampler()[1], cell.first_node()
    if first >= steps:
        raise UserError(f"start {cell.start:g} of {steps} steps leaves none; lower it")
    moves, radius, factor = (
        cell.method == "warp" and cell.kind == "move",
        plan.radius(cell),
        plan.base.vae_factor,
    )
    nearest = max(radius, factor) if moves else factor
    for (i, (_, a)), (j, (_, b)) in combinations(enumerate(plan.ways), 2):
        if math.dist(a, b) < nearest:
            raise UserError(
                f"points: the targets of ways {i} and {j} overlap, {math.dist(a, b) / plan.view.scale:.0f} "
                f"pixels of {nearest / plan.view.scale:.0f} apart; move one away, or lower radius"
            )
    for number, (handle, target) in enumerate(plan.ways):
        length = math.dist(handle, target)
        if not length:
            yield f"way {number} leads nowhere: there the result is what the autoencoder makes of the picture"
        elif length < factor:
            own, least = length / plan.view.scale, factor / plan.view.scale
            yield (
                f"way {number} is {own:.0f} pixels long, less than a cell of the latents, {least:.0f}: "
                "little of it may be seen"
            )
        if moves and not all(
            radius <= p <= side - radius for p, side in zip(target, plan.shape, strict=True)
        ):
            yield f"way {number} ends so near to the picture's edge that what it moves is cut off there"
    if not cell.prompt:
        yield "prompt is empty: say what the picture shows, for under its words it is inverted"
    if cell.method == "warp" and cell.start is not None and cell.start < 0.6:
        yield f"start {cell.start:g}: from so early a step the model may take back what was moved"


def count_drags(cfg: DragConfig) -> int:
    return len(cfg.numbered_cells())


def describe_drag(cfg: DragConfig, plan: DragPlan) -> list[str]:
    """The plan in lines for --check.

    Raises:
        UserError: a LoRA that does not fit the base.
    """
    cells = [cell.resolved()[0] for _, cell in cfg.numbered_cells()]
    paths = [lora.path for cell in cells for lora in (*cell.all_loras(), *cell.prompt_loras())]
    lines = model_lines(plan.base, [path for path in paths if path not in plan.missing])
    lines += [f"to train    {path}, with {cfg.fit_config}" for path in plan.missing]
    lines += memory_lines(cells, plan.base, [plan.shape])
    pulled = [cell for cell in cells if cell.method == "drag"]
    kept = [kept for cell in pulled if (kept := pull_bytes(cell, plan))]
    if kept:
        half = "" if cfg.mixed_precision == "no" else ", half of it in half precision"
        lines.append(
            f"            a pull of the latents keeps {max(kept) / 1e6:,.1f} MB for the way back{half}"
        )
    lengths = ", ".join(f"{math.dist(*way) / plan.view.scale:.0f}" for way in plan.ways)
    lines.append(f"ways        {len(plan.ways)}, of {lengths} pixels")
    rows = sum(map(_evaluations, cells))
    paths = {(cell.sampler()[1], cell.solver) for cell in cells}
    inverted = sum(inversion_evaluations(*path) for path in paths)
    lines.append(
        f"work        {rows:,} rows through the U-Net at most, {inverted} before them for each new path"
    )
    return lines


def holds_outside(cell: DragConfig, plan: DragPlan) -> bool:
    """Whether the latents of the next step are held fast, for which the U-Net's pass must be whole."""
    return plan.mask is not None and cell.mask_weight > 0


def pull_bytes(cell: DragConfig, plan: DragPlan) -> int | None:
    """What autograd keeps in float32 for the gradient of the latents; None of a base that is not known."""
    block = None if holds_outside(cell, plan) else cell.feature_block
    return backward_bytes(plan.base, plan.shape, 1, block=block)


def _evaluations(cell: DragConfig) -> int:
    """Rows through the U-Net for a resolved cell; the picture rides beside the result."""
    _, steps, guidance = cell.sampler()
    followed = 2 + cell.iterations if cell.method == "drag" else 0
    return followed + 2 * (steps - cell.first_node()) * (1 + (guidance > 1))
