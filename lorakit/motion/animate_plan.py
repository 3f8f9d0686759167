"""What animate.py will do, worked out from its config and from files' headers. No torch here."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.ground.errors import UserError
from lorakit.motion.camera import Pose, path
from lorakit.motion.config import DRAWING, AnimateConfig
from lorakit.motion.windows import WINDOW, windows
from lorakit.pictures.animation import missing_writers
from lorakit.pictures.images import image_size
from lorakit.sampling.config import check_size, shape_of
from lorakit.sampling.fitting import missing_loras
from lorakit.sampling.forecast import memory_lines, model_lines
from lorakit.sampling.prompts import lora_files, text_notes
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.few_steps import refuse_few_steps
from lorakit.weights.identity import base_identity, file_sha256, lora_sha256
from lorakit.weights.motion_adapter import MotionInfo, inspect_motion_adapter, with_betas

VERSION = 1  # of what frames are a function of; counts up when the same config gives other frames
# What only shows frames, or says where they go.
PRESENTATION = {
    "output_dir", "name", "overwrite", "formats", "fps", "hold_ms", "pingpong", "min_side", "model_dirs",
    "grid", "train_if_missing", "fit_config",
}  # fmt: skip


@dataclass(frozen=True)
class AnimatePlan:
    """`cfg` with a value for each key of the sampler; `shape` is (width, height) in pixels.

    `missing` LoRAs are to be trained first.
    `wide` are the windows of the adapter, with weights; None: there is none, and frames are made alone.
    """

    cfg: AnimateConfig
    base: BaseInfo
    adapter: MotionInfo | None
    shape: tuple[int, int]
    poses: Sequence[Pose]
    wide: Sequence[Sequence[tuple[int, float]]] | None
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def make_animate_plan(cfg: AnimateConfig, base: BaseInfo | None = None) -> AnimatePlan:
    """Check base, adapter, LoRA files, writers and prompts.

    Args:
        base: what is known of the base once it is loaded; None: what its files tell.

    Raises:
        UserError: what is missing, unreadable or does not fit together; names the key and the remedy.
    """
    base = base or inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_size(cfg, base)
    base = with_betas(base, cfg.beta_schedule)
    for name, reason in missing_writers(cfg.formats).items():
        raise UserError(f'formats: "{name}" cannot be written: {reason}; or leave it out')
    resolved, notes = cfg.resolved()
    scheduler, _, guidance = resolved.sampler()
    if scheduler in DRAWING:
        raise UserError(
            f'scheduler "{scheduler}": draws noise on its way that lies in no scene; set scheduler=ddim, or '
            "another one without"
        )
    adapter = inspect_motion_adapter(cfg.motion_adapter, base) if cfg.motion_adapter else None
    texts = [(prompt, "prompt" if len(cfg.prompts()) > 1 else "") for prompt in cfg.prompts()]
    texts.append((cfg.negative_prompt if guidance != 1 else "", "negative_prompt"))
    notes = [
        *base.notes,
        *notes,
        *text_notes(texts, cfg.prompt_syntax, cfg.embedding_dirs, base, lora_files([cfg])),
    ]
    missing = missing_loras([cfg.lora] if cfg.lora else [], cfg.train_if_missing, cfg.fit_config, "lora=null")
    shape = cfg.width or base.resolution, cfg.height or base.resolution
    if cfg.image:
        shape = shape_of(cfg, base, cfg.image)
        notes += _picture_notes(cfg, shape, missing)
    poses = path(cfg.frames, shape, cfg.camera.keys(), cfg.camera.easing, cfg.loop)
    wide = _wide(cfg, adapter) if adapter else None
    return AnimatePlan(resolved, base, adapter, shape, poses, wide, missing, tuple(dict.fromkeys(notes)))


def _picture_notes(cfg: AnimateConfig, shape: tuple[int, int], missing: Sequence[str]) -> list[str]:
    """What should be known of the picture that a film starts from.

    Raises:
        UserError: it cannot be read, or a LoRA is for few steps, under which it has no path to its noise.
    """
    assert cfg.image
    size, notes = image_size(cfg.image), []
    if size != shape:
        notes.append(f"{cfg.image} is {size[0]}x{size[1]}, filmed at {shape[0]}x{shape[1]}")
    if not cfg.prompts()[0]:
        notes.append("prompt is empty: say what the picture shows, for what comes into view is made of that")
    for lora in cfg.all_loras():
        if lora.weight and lora.path not in missing:
            refuse_few_steps(lora.path)
    return notes


def _wide(cfg: AnimateConfig, adapter: MotionInfo) -> list[list[tuple[int, float]]]:
    """Raises UserError: a window beyond the adapter's positions."""
    size = cfg.window or min(adapter.positions, WINDOW)
    if size > adapter.positions:
        raise UserError(f"window {size}: {adapter.name} has {adapter.positions} positions; lower it")
    overlap = cfg.overlap or max(1, size // 4)
    if overlap >= size:
        raise UserError(f"overlap {overlap}: windows of {size} frames share {size - 1} at most; lower it")
    return windows(cfg.frames, size, overlap, cfg.loop)


def describe_animation(plan: AnimatePlan) -> list[str]:
    """The plan in lines for --check.

    Raises:
        UserError: a LoRA that does not fit.
    """
    cfg = plan.cfg
    paths = [lora.path for lora in cfg.all_loras()]
    lines = model_lines(
        plan.base,
        [path for path in paths if path not in plan.missing],
        plan.adapter.shapes if plan.adapter else None,
    )
    lines += [f"to train    {path}, with {cfg.fit_config}" for path in plan.missing]
    if plan.adapter:
        count = sum(math.prod(shape) for shape in plan.adapter.shapes.values())
        lines.append(
            f"adapter     {plan.adapter.name}: {count:,} parameters, {plan.adapter.positions} positions"
        )
    moves = ", ".join(f"{name} {keys}" for name, keys in cfg.camera.keys().items() if len(set(keys)) > 1)
    lines.append(f"camera      {moves or 'at rest'}")
    _, steps, guidance = cfg.sampler()
    rows = sum(map(len, plan.wide)) if plan.wide else cfg.frames
    if plan.wide and len(plan.wide) > 1:
        lines.append(f"windows     {len(plan.wide)} of {len(plan.wide[0])} frames")
    together = cfg.model_copy(update={"batch_size": len(plan.wide[0])}) if plan.wide else cfg
    extra = sum(math.prod(shape) for shape in plan.adapter.shapes.values()) if plan.adapter else 0
    lines += memory_lines([together], plan.base, [plan.shape], extra)
    lines.append(f"work        {rows * steps * (1 + (guidance != 1)):,} rows through the U-Net")
    formats = "".join(f", {name}" for name in cfg.formats)
    return [
        *lines,
        f"writes      {Path(cfg.output_dir) / cfg.name}: PNG frames, sheet, report, page{formats}",
    ]


def fingerprint(plan: AnimatePlan, dtype: str) -> str:
    """A hash of all that the frames are a function of: settings and the content of every file."""
    cfg = plan.cfg
    settings = {key: value for key, value in cfg.model_dump(mode="json").items() if key not in PRESENTATION}
    settings["loras"] = [
        each.model_dump(mode="json") | {"path": lora_sha256(each.path)} for each in cfg.all_loras()
    ]
    settings["image"] = file_sha256(cfg.image) if cfg.image else None
    files = dict.fromkeys(str(place.path) for place in plan.adapter.places.values()) if plan.adapter else {}
    settings["motion_adapter"] = [
        [file_sha256(file) for file in files],
        plan.adapter and dict(plan.adapter.config),
    ]
    settings |= {"shape": plan.shape, "base": base_identity(plan.base), "dtype": dtype, "version": VERSION}
    del settings["pretrained_model_name_or_path"], settings["base_config"], settings["lora"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
