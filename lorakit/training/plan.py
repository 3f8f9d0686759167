"""What a training run will do, worked out from config, pictures and the base's files. No torch here.

Everything that a user can have got wrong with the data or the base shows while a plan is made.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import existing_parent
from lorakit.pictures.folder import Table
from lorakit.pictures.views import Shape, assign_shapes, share_lost, views_of
from lorakit.training.class_pictures import given_pictures
from lorakit.training.doubts import doubts
from lorakit.training.motion_config import check_room, clips_of, with_motion
from lorakit.training.order import holds_steps
from lorakit.training.tables import cache_dir, folder_options, read_table, read_validation
from lorakit.training.words_config import check_words, trains_lora, word_paths
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import check_clip_skip
from lorakit.weights.lora_file import ends_in
from lorakit.weights.motion_adapter import MotionInfo
from lorakit.weights.text_states import check_states

LONGEST_NAME = 255  # bytes, on nearly every file system
MUCH = 0.1  # of a picture, cropped


@dataclass(frozen=True)
class Plan:
    """`total_batch` samples per step, split over `world_size` processes and `accumulation` micro-batches.

    `samples` is how many the run has where n_epochs ends it, else None; `class_table` the pictures of
    prior.class_data_dir; `adapter` that of the objective motion, once the base is here.
    """

    base: BaseInfo
    table: Table
    shapes: tuple[Shape, ...]
    validation: Table | None
    validation_shapes: tuple[Shape, ...]
    class_table: Table | None
    adapter: MotionInfo | None
    resolution: int
    world_size: int
    accumulation: int
    total_batch: int
    steps: int
    samples: int | None
    cache_dir: Path
    notes: tuple[str, ...]

    @property
    def repeats(self) -> tuple[int, ...]:
        return tuple(row.repeats for row in self.table.rows)

    @property
    def order(self) -> dict[str, Any]:
        """Arguments of order.SampleOrder but for the seed."""
        whole = self.steps * self.total_batch
        full = holds_steps(self.shapes, self.repeats, self.total_batch)
        return {
            "buckets": self.shapes,
            "repeats": self.repeats,
            "total_batch": self.total_batch,
            "steps": self.steps,
            "showings": whole if full or self.samples is None else min(whole, self.samples),
        }


def make_plan(cfg: Any, world_size: int = 1, base: BaseInfo | None = None) -> Plan:
    """Check pictures, captions and base, and count the steps.

    Args:
        base: what is known of the base once it is loaded; None: what its files tell.

    Raises:
        UserError: of one of the kinds DataError, BaseError, or for sizes that do not fit together.
    """
    _check_names(cfg)
    base = base or inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    base, adapter = with_motion(cfg, base)
    _check_for(cfg, base, adapter)
    resolution = cfg.resolution or base.resolution
    if resolution % base.vae_factor:
        raise UserError(f"resolution {resolution}: must divide by the base's VAE factor, {base.vae_factor}")
    table = read_table(cfg)
    check_words(cfg, base, table)
    validation = read_validation(cfg)
    buckets = cfg.aspect_ratio_buckets
    if buckets is None:  # a single square keeps the very resolution, which need be no bucket's
        first, *others = table.rows
        buckets = bool(others) or first.width != first.height
    if buckets and resolution < base.size_multiple:
        raise UserError(
            f"resolution {resolution}, aspect_ratio_buckets: buckets of this base are multiples of "
            f"{base.size_multiple} pixels"
        )

    def shapes_of(rows) -> tuple[Shape, ...]:
        sizes = [(row.width, row.height) for row in rows]
        return tuple(assign_shapes(sizes, resolution, base.size_multiple, buckets, cfg.max_aspect))

    accumulation = _accumulation(cfg, world_size)
    total_batch = cfg.train_batch_size * world_size * accumulation
    epoch = sum(row.repeats for row in table.rows)
    steps = count_steps(cfg, epoch, total_batch)
    shapes = shapes_of(table.rows)
    plan = Plan(
        base=base,
        table=table,
        shapes=shapes,
        validation=validation,
        validation_shapes=shapes_of(validation.rows) if validation else (),
        class_table=given_pictures(cfg, base, **folder_options(cfg) | {"masks": False}),
        adapter=adapter,
        resolution=resolution,
        world_size=world_size,
        accumulation=accumulation,
        total_batch=total_batch,
        steps=steps,
        samples=cfg.n_epochs * epoch
        if cfg.n_epochs and steps * total_batch >= cfg.n_epochs * epoch
        else None,
        cache_dir=cache_dir(cfg),
        notes=(*base.notes, *_notes(cfg, table, shapes, validation), *_earlier_cache(cache_dir(cfg))),
    )
    check_room(cfg, plan)
    return replace(plan, notes=(*plan.notes, *doubts(cfg, plan)))


def _accumulation(cfg: Any, world_size: int) -> int:
    if not cfg.total_batch_size:
        return cfg.gradient_accumulation_steps
    if cfg.total_batch_size % (cfg.train_batch_size * world_size):
        raise UserError(
            f"total_batch_size {cfg.total_batch_size}: must divide by train_batch_size x processes, "
            f"{cfg.train_batch_size} x {world_size}"
        )
    return cfg.total_batch_size // (cfg.train_batch_size * world_size)


def count_steps(cfg: Any, epoch: int, total_batch: int) -> int:
    """Optimizer steps: as n_epochs of `epoch` samples or max_train_steps say, whichever ends first."""
    epochs = math.inf if cfg.n_epochs is None else math.ceil(cfg.n_epochs * epoch / total_batch)
    return int(min(epochs, cfg.max_train_steps or math.inf))


def _earlier_cache(folder: Path) -> Iterator[str]:
    if any(next(folder.glob(f"{kind}/*.safetensors"), None) for kind in ("latents", "masks", "text")):
        yield (
            f"cache_dir {folder}: files of an earlier version, one for each picture, are not read, and "
            "what they hold is made anew; delete */*.safetensors there"
        )


def result_paths(cfg: Any) -> dict[Path, Any]:
    """The LoRA files that a run writes, and the layout of each; none where words alone are learnt."""
    if not trains_lora(cfg):
        return {}
    final = Path(cfg.output_dir) / f"{cfg.ckpt_name}.safetensors"
    if cfg.save_format != "both":
        return {final: cfg.save_format}
    return {final: "kohya", final.with_name(f"{cfg.ckpt_name}_diffusers.safetensors"): "diffusers"}


def _check_names(cfg: Any) -> None:
    """Refuse output names that would fail, or leave output_dir, only after hours of training."""
    if cfg.ckpt_name in (".", ".."):
        raise UserError(f'ckpt_name "{cfg.ckpt_name}": names a folder that exists already; choose a name')
    run = Path(cfg.output_dir) / cfg.ckpt_name
    if (run / "model_index.json").exists() or run.absolute() == cache_dir(cfg).absolute():
        raise UserError(f"ckpt_name: {run} is a base model's folder or the cache; choose another name")
    for path in (*result_paths(cfg), *word_paths(cfg).values()):
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"ckpt_name: {path.name[:40]}… is longer than {LONGEST_NAME} bytes; shorten it")
        if path.is_dir():
            raise UserError(f"{path}: a folder has the name of the LoRA file; rename it or change ckpt_name")
    if cfg.cache_dir and not (cache := existing_parent(Path(cfg.cache_dir))).is_dir():
        raise OutputError(f"cache_dir {cfg.cache_dir}: {cache} is a file; choose another folder")


def _check_for(cfg: Any, base: BaseInfo, adapter: MotionInfo | None) -> None:
    """Refuse what this base has not, or cannot take."""
    check_clip_skip(base, cfg.clip_skip)
    _check_targets(cfg, base, adapter)
    if cfg.prompt_embeds:
        check_states(cfg.prompt_embeds, base)


def _check_targets(cfg: Any, base: BaseInfo, adapter: MotionInfo | None) -> None:
    """Refuse target_modules that name what the U-Net lacks, as far as the base's headers are here."""
    if isinstance(cfg.target_modules, str) or not base.known:
        return
    shapes = base.shapes("unet") | (adapter.shapes if adapter else {})
    layers = [key for key, shape in shapes.items() if len(shape) in (2, 4)]
    names = [key.removesuffix(".weight") for key in layers if key.endswith(".weight")]
    lost = [end for end in cfg.target_modules if not any(ends_in(name, end) for name in names)]
    if lost or not cfg.target_modules:
        lasts = sorted({name.rpartition(".")[2] for name in names} - set("0123456789"))
        raise UserError(
            f"target_modules: no layer of the U-Net ends in {', '.join(lost) or 'nothing'}; there are "
            f"{', '.join(lasts[:20])}; or take a preset such as attention"
        )


def missing_packages(cfg: Any) -> None:
    """Refuse an optimizer whose package is not installed, before anything heavy is imported.

    Raises:
        UserError: names the package.
    """
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(cfg.optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f'optimizer "{cfg.optimizer}" needs a package that is not installed: pip install {package}'
        )


def _notes(cfg: Any, table: Table, shapes: tuple[Shape, ...], validation: Table | None) -> Iterator[str]:
    yield from table.warnings
    yield from validation.warnings if validation else ()
    if not (cfg.motion and cfg.motion.camera):  # which looks at a part of each
        yield from _notes_on_sizes(table, shapes)
    if validation:
        same = {row.sha256 for row in table.rows} & {row.sha256 for row in validation.rows}
        if same:
            count = f"{len(same)} picture(s)"
            yield f"{count} are in both data_dir and validation_data_dir: their loss proves nothing"


def _notes_on_sizes(table: Table, shapes: tuple[Shape, ...]) -> Iterator[str]:
    small = [r.name for r, (w, h) in zip(table.rows, shapes, strict=True) if r.width < w or r.height < h]
    if small:
        names = ", ".join(small[:5])
        yield f"{len(small)} picture(s) are smaller than they are trained at and will be enlarged: {names}"
    lost = [(share_lost((r.width, r.height), s), r.name) for r, s in zip(table.rows, shapes, strict=True)]
    if lost := sorted((each for each in lost if each[0] > MUCH), reverse=True):
        names = ", ".join(f"{name} {share:.0%}" for share, name in lost[:5])
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        yield f"{len(lost)} picture(s) lose more than {MUCH:.0%} to cropping at each showing: {names}{more}"


# ---- what the run will need ----


Views = Sequence[Sequence[Any]]  # of each row: a View, or a clip


def training_views(cfg: Any, plan: Plan) -> Views:
    if cfg.motion:
        return clips_of(cfg, plan.table, plan.shapes)
    crops = cfg.random_crops if cfg.crop == "random" else 1
    rows = zip(plan.table.rows, plan.shapes, strict=True)
    return [views_of(row, shape, flip=cfg.random_flip, crops=crops) for row, shape in rows]


def validation_views(cfg: Any, plan: Plan) -> Views:
    if cfg.motion and plan.validation:
        return clips_of(cfg, plan.validation, plan.validation_shapes)
    rows = plan.validation.rows if plan.validation else ()
    return [views_of(row, shape) for row, shape in zip(rows, plan.validation_shapes, strict=True)]
