"""What edit.py will do, worked out from its config and from files' headers. No torch here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.diffusion.inversion_plan import inversion_evaluations
from lorakit.editing.config import DRAWS, EditConfig, PictureConfig
from lorakit.editing.imagic_plan import BATCH, ImagicFit, parts_of, plan_fits
from lorakit.ground.errors import UserError
from lorakit.pictures.images import image_size
from lorakit.pictures.painted import read_mask
from lorakit.sampling.config import check_size, shape_of
from lorakit.sampling.fitting import missing_loras
from lorakit.sampling.forecast import (
    LIBRARIES,
    backward_bytes,
    halves_of,
    memory_lines,
    model_lines,
    time_words,
)
from lorakit.sampling.prompts import lora_files, text_notes
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import clip_skip_notes
from lorakit.weights.few_steps import refuse_few_steps

SMALL_CHANGE = 0.5
"""Of `start`: from here on most edits are hardly seen, see docs/EDIT.md."""


@dataclass(frozen=True)
class EditPlan:
    """`shape` is (width, height) at which the picture is edited; `missing` LoRAs are to be trained first.

    `fits` are those of imagic, missing or not.
    `mask` (H, W) in [0, 1], at that shape: 1 where the result may change; None: anywhere.
    """

    base: BaseInfo
    shape: tuple[int, int]
    missing: tuple[str, ...]
    fits: tuple[ImagicFit, ...]
    mask: np.ndarray | None
    notes: tuple[str, ...]


def make_edit_plan(cfg: EditConfig, base: BaseInfo | None = None) -> EditPlan:
    """Check base, picture, mask, LoRA files and what the cells of the grid ask for.

    Args:
        base: what is known of the base once it is loaded; None: what its files tell.

    Raises:
        UserError: what is missing, unreadable or does not fit together; names the key and the remedy.
    """
    base = base or inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_size(cfg, base)
    size, shape = image_size(cfg.image), shape_of(cfg, base, cfg.image)
    notes = [*base.notes]
    if size != shape:
        notes.append(f"{cfg.image} is {size[0]}x{size[1]}, edited at {shape[0]}x{shape[1]}")
    mask = read_mask(cfg.mask, cfg.image, shape) if cfg.mask else None
    fits = plan_fits(cfg, base, shape)
    wanted = [fit.lora for fit in fits] or ([cfg.lora] if cfg.lora else [])
    with_config, otherwise = (cfg.imagic_config, "method=swap") if fits else (cfg.fit_config, "lora=null")
    missing = missing_loras(wanted, cfg.train_if_missing, with_config, otherwise)
    for cell in _parts(cfg, fits):
        notes += [*lora_notes(cell, missing), *_cell_notes(cell.resolved()[0])]
    loras = lora_files(cell for _, cell in cfg.numbered_cells())
    notes += text_notes(_texts(cfg), cfg.prompt_syntax, cfg.embedding_dirs, base, loras)
    return EditPlan(base, shape, missing, fits, mask, tuple(dict.fromkeys(notes)))


def lora_notes(cell: PictureConfig, missing: Sequence[str]) -> list[str]:
    """What should be known of the LoRAs that take part in a cell, but for those that are to be trained first.

    Raises:
        UserError: one for few steps, under which no picture has a path to its noise.
    """
    loras = [lora.path for lora in (*cell.all_loras(), *cell.prompt_loras()) if lora.weight]
    present = [path for path in dict.fromkeys(loras) if path not in missing]
    for path in present:
        refuse_few_steps(path)
    return clip_skip_notes(cell.clip_skip, present)


def _parts(cfg: EditConfig, fits: Sequence[ImagicFit]) -> list[EditConfig]:
    return [part for _, cell in cfg.numbered_cells() for part in parts_of(cell, fits)]


def count_results(cfg: EditConfig) -> int:
    return sum(len(cell.targets()) * len(cell.seeds()) for _, cell in cfg.numbered_cells())


def describe_edit(cfg: EditConfig, plan: EditPlan) -> list[str]:
    """The plan in lines for --check.

    Raises:
        UserError: a LoRA that does not fit the base.
    """
    cells = [cell.resolved()[0] for cell in _parts(cfg, plan.fits)]
    paths = [lora.path for cell in cells for lora in (*cell.all_loras(), *cell.prompt_loras())]
    lines = model_lines(plan.base, [path for path in paths if path not in plan.missing])
    lines += _fit_lines(cfg, plan)
    lines += memory_lines(cells, plan.base, [plan.shape])
    rows = sum(map(_evaluations, cells))
    ways = {(cell.sampler()[1], cell.solver) for cell in cells if cell.method not in DRAWS}
    inverted = sum(inversion_evaluations(*way) for way in ways)
    lines.append(f"work        {rows:,} rows through the U-Net, {inverted} before them for each new path")
    return [*lines, f"time        {time_words(cfg, count_results(cfg))}"]


def _fit_lines(cfg: EditConfig, plan: EditPlan) -> Iterator[str]:
    """What is to be trained first, and what that needs."""
    with_config = cfg.imagic_config if plan.fits else cfg.fit_config
    for fit in plan.fits:
        if left := fit.steps - fit.done:
            yield f"to fit      {fit.embedding}, {left} steps of {BATCH} rows through the U-Net and back"
    yield from (f"to train    {path}, with {with_config}" for path in plan.missing)
    if plan.base.known and any(fit.done < fit.steps for fit in plan.fits):
        for half in halves_of(cfg.mixed_precision):
            kept = backward_bytes(plan.base, plan.shape, min(BATCH, cfg.batch_size), half) or 0
            unet = plan.base.parameters.get("unet", 0) * (2 if half else 4)
            total = f"about {(kept + unet + LIBRARIES) / 1e6:,.0f} MB"
            yield f"            {total} in {'half precision' if half else 'float32'}"


def _evaluations(cell: EditConfig) -> int:
    """Rows through the U-Net for a resolved cell; the picture rides beside the results of swap."""
    _, steps, guidance = cell.sampler()
    results = len(cell.targets()) * len(cell.seeds())
    rows = results + (0 if cell.method in DRAWS else math.ceil(results / cell.batch_size))
    return rows * (steps - cell.first_node()) * (1 + (guidance > 1))


def _texts(cfg: EditConfig) -> list[tuple[str, str]]:
    """Every prompt, with the key that cannot name LoRAs: they are the same for picture and results."""
    cells = [cell for _, cell in cfg.numbered_cells()]
    targets = [(target, "target_prompt") for cell in cells for target in cell.targets()]
    return (
        [(cell.prompt, "") for cell in cells]
        + targets
        + [(c.negative_prompt, "negative_prompt") for c in cells]
    )


def _cell_notes(cell: EditConfig) -> Sequence[str]:
    """What a user should know of one resolved cell.

    Raises:
        UserError: no step is left.
    """
    steps, first = cell.sampler()[1], cell.first_node()
    if first >= steps:
        raise UserError(f"start {cell.start:g} of {steps} steps leaves none; lower it")
    notes = []
    if not cell.prompt and cell.method == "swap":
        notes.append("prompt is empty: say what the picture shows, for only what differs is changed")
    if cell.method == "swap" and cell.prompt in cell.targets():
        notes.append("target_prompt is the prompt: the result is what the autoencoder makes of the picture")
    if cell.method == "swap" and cell.start >= SMALL_CHANGE:
        notes.append(f"start {cell.start:g} takes over most of the picture: little will change")
    if cell.method == "imagic" and (cell.eta or 0) > 1:
        notes.append(f"eta {cell.eta:g} is past the target, where nothing was fitted: colours burn")
    if cell.method == "sdedit" and not first:
        notes.append(f"{cell.method} from start 0 keeps next to nothing of the picture; 0.2 to 0.5 is usual")
    return notes
