"""What a training run will do, worked out from config, pictures and the base's files. No torch here.

Everything that a user can have got wrong with the data or the base shows while a plan is made.
"""

import importlib.util
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.base import BaseInfo, inspect_base, weight_shapes, weights_hash
from lorakit.errors import OutputError, UserError
from lorakit.folder import Table, read_folder, read_rows
from lorakit.lora_file import TARGET_PRESETS
from lorakit.views import Shape, View, assign_shapes, views_of

LONGEST_NAME = 255  # bytes, on nearly every file system


@dataclass(frozen=True)
class Plan:
    """`total_batch` samples per step, split over `world_size` processes and `accumulation` micro-batches."""

    base: BaseInfo
    table: Table
    shapes: tuple[Shape, ...]
    validation: Table | None
    validation_shapes: tuple[Shape, ...]
    resolution: int
    world_size: int
    accumulation: int
    total_batch: int
    steps: int
    cache_dir: Path
    notes: tuple[str, ...]


def launched_processes(environment: dict[str, str] | None = None) -> tuple[int, int]:
    """(rank, processes) as the launcher says.

    Raises:
        UserError: `accelerate launch --cpu --num_processes N` was asked for several and started one.
    """
    env = os.environ if environment is None else environment
    if "MASTER_ADDR" in env and "ACCELERATE_USE_CPU" in env and "WORLD_SIZE" not in env:
        raise UserError(
            "accelerate launch was asked for several CPU processes and started one; start them with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train_lora.py …"
        )
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))


def make_plan(cfg: Any, world_size: int = 1) -> Plan:
    """Check pictures, captions and base, and count the steps.

    Raises:
        UserError: of one of the kinds DataError, BaseError, or for sizes that do not fit together.
    """
    _check_names(cfg)
    base = inspect_base(cfg.pretrained_model_name_or_path)
    _check_targets(cfg, base)
    resolution = cfg.resolution or base.resolution
    if resolution % base.vae_factor:
        raise UserError(f"resolution {resolution}: must divide by the base's VAE factor, {base.vae_factor}")
    table = read_table(cfg)
    validation = None
    if cfg.validation_data_dir:
        validation = read_folder(Path(cfg.validation_data_dir), **folder_options(cfg))
    buckets = len(table.rows) > 1 if cfg.aspect_ratio_buckets is None else cfg.aspect_ratio_buckets
    if buckets and resolution < base.size_multiple:
        raise UserError(
            f"resolution {resolution}, aspect_ratio_buckets: buckets of this base are multiples of "
            f"{base.size_multiple} pixels"
        )

    def shapes_of(rows) -> tuple[Shape, ...]:
        sizes = [(row.width, row.height) for row in rows]
        return tuple(assign_shapes(sizes, resolution, base.size_multiple, buckets))

    per_pass = cfg.train_batch_size * world_size
    accumulation = cfg.gradient_accumulation_steps
    if cfg.total_batch_size:
        if cfg.total_batch_size % per_pass:
            raise UserError(
                f"total_batch_size {cfg.total_batch_size}: must divide by train_batch_size x processes, "
                f"{cfg.train_batch_size} x {world_size}"
            )
        accumulation = cfg.total_batch_size // per_pass
    total_batch = per_pass * accumulation
    epochs = math.inf if cfg.n_epochs is None else math.ceil(cfg.n_epochs * len(table.rows) / total_batch)
    steps = int(min(epochs, cfg.max_train_steps or math.inf))
    shapes = shapes_of(table.rows)
    return Plan(
        base=base,
        table=table,
        shapes=shapes,
        validation=validation,
        validation_shapes=shapes_of(validation.rows) if validation else (),
        resolution=resolution,
        world_size=world_size,
        accumulation=accumulation,
        total_batch=total_batch,
        steps=steps,
        cache_dir=_cache_dir(cfg),
        notes=tuple(_notes(table, shapes, validation)),
    )


def _cache_dir(cfg: Any) -> Path:
    return Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")


def result_paths(cfg: Any) -> dict[Path, Any]:
    """The LoRA files that a run writes, and the layout of each."""
    final = Path(cfg.output_dir) / f"{cfg.ckpt_name}.safetensors"
    if cfg.save_format != "both":
        return {final: cfg.save_format}
    return {final: "kohya", final.with_name(f"{cfg.ckpt_name}_diffusers.safetensors"): "diffusers"}


def _check_names(cfg: Any) -> None:
    """Refuse output names that would fail, or leave output_dir, only after hours of training."""
    if cfg.ckpt_name in (".", ".."):
        raise UserError(f'ckpt_name "{cfg.ckpt_name}": names a folder that exists already; choose a name')
    run, cache_dir = Path(cfg.output_dir) / cfg.ckpt_name, _cache_dir(cfg)
    if (run / "model_index.json").exists() or run.absolute() == cache_dir.absolute():
        raise UserError(f"ckpt_name: {run} is a base model's folder or the cache; choose another name")
    for path in result_paths(cfg):
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"ckpt_name: {path.name[:40]}… is longer than {LONGEST_NAME} bytes; shorten it")
        if path.is_dir():
            raise UserError(f"{path}: a folder has the name of the LoRA file; rename it or change ckpt_name")
    if cfg.cache_dir and not (cache := _existing(Path(cfg.cache_dir))).is_dir():
        raise OutputError(f"cache_dir {cfg.cache_dir}: {cache} is a file; choose another folder")


def _check_targets(cfg: Any, base: BaseInfo) -> None:
    """Refuse target_modules that name what the U-Net lacks, as far as the base's headers are here."""
    if isinstance(cfg.target_modules, str) or not base.known or base.kind == "file":
        return
    layers = [key for key, shape in weight_shapes(base.files["unet"]).items() if len(shape) in (2, 4)]
    names = [f".{key.removesuffix('.weight')}" for key in layers if key.endswith(".weight")]
    lost = [end for end in cfg.target_modules if not any(name.endswith(f".{end}") for name in names)]
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


def folder_options(cfg: Any) -> dict[str, Any]:
    keys = (
        "caption_column",
        "missing_captions",
        "broken_images",
        "allow_symlinks",
        "max_image_pixels",
        "max_aspect",
    )
    return {key: getattr(cfg, key) for key in keys}


def read_table(cfg: Any) -> Table:
    """The checked rows of `data_dir` or of `dataset_name`."""
    if cfg.data_dir is not None:
        return read_folder(Path(cfg.data_dir), **folder_options(cfg))
    options = folder_options(cfg)
    del options["caption_column"], options["allow_symlinks"]
    return read_rows(_dataset_records(cfg), **options)


def _load_dataset(cfg: Any) -> Any:
    """One split of a Hugging Face dataset, from a folder that save_to_disk wrote or through its builder."""
    import datasets

    datasets.disable_progress_bars()
    saved = [Path(cfg.dataset_name) / name for name in ("dataset_info.json", "dataset_dict.json")]
    if not any(path.exists() for path in saved):
        return datasets.load_dataset(cfg.dataset_name, cfg.dataset_config_name, split=cfg.dataset_split)
    dataset = datasets.load_from_disk(cfg.dataset_name)
    return dataset[cfg.dataset_split] if isinstance(dataset, datasets.DatasetDict) else dataset


def _dataset_records(cfg: Any) -> Iterator[tuple[str, bytes, Any]]:
    """(name, bytes of the picture, caption) of each row of a Hugging Face dataset."""
    import datasets

    where = f"dataset_name {cfg.dataset_name}"
    try:
        dataset = _load_dataset(cfg)
    except Exception as error:  # each builder raises its own kinds
        raise UserError(f"{where}: cannot be loaded: {str(error).splitlines()[0]}") from None
    caption = cfg.caption_column or "text"
    missing = [name for name in (cfg.image_column, caption) if name not in dataset.column_names]
    if missing:
        raise UserError(
            f"{where}: no column {' or '.join(missing)} (image_column, caption_column); its columns are "
            f"{', '.join(dataset.column_names)}"
        )
    dataset = dataset.select_columns([cfg.image_column, caption])
    dataset = dataset.cast_column(cfg.image_column, datasets.Image(decode=False))
    for number, record in enumerate(dataset):
        image = record[cfg.image_column]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield f"row {number}", content, record[caption]


def _notes(table: Table, shapes: tuple[Shape, ...], validation: Table | None) -> Iterator[str]:
    yield from table.warnings
    yield from validation.warnings if validation else ()
    small = [r.name for r, (w, h) in zip(table.rows, shapes, strict=True) if r.width < w or r.height < h]
    if small:
        names = ", ".join(small[:5])
        yield f"{len(small)} picture(s) are smaller than they are trained at and will be enlarged: {names}"
    if validation:
        same = {row.sha256 for row in table.rows} & {row.sha256 for row in validation.rows}
        if same:
            count = f"{len(same)} picture(s)"
            yield f"{count} are in both data_dir and validation_data_dir: their loss proves nothing"


# ---- what the run will need ----


Views = list[list[View]]  # of each row


def training_views(cfg: Any, plan: Plan) -> Views:
    crops = cfg.random_crops if cfg.crop == "random" else 1
    rows = zip(plan.table.rows, plan.shapes, strict=True)
    return [views_of(row, shape, flip=cfg.random_flip, crops=crops) for row, shape in rows]


def validation_views(plan: Plan) -> Views:
    rows = plan.validation.rows if plan.validation else ()
    return [views_of(row, shape) for row, shape in zip(rows, plan.validation_shapes, strict=True)]


def lora_parameters(cfg: Any, base: BaseInfo) -> int | None:
    """How many numbers are trained, counted in the headers of the base's weights; None without a folder."""
    if not base.known or base.kind == "file":
        return None
    unet, text = TARGET_PRESETS["unet"], TARGET_PRESETS["text_encoder"]
    chosen: str | tuple[str, ...] = cfg.target_modules
    targets = {"unet": unet[chosen] if isinstance(chosen, str) else chosen}
    if cfg.train_text_encoder:
        targets["text_encoder"] = text[chosen if isinstance(chosen, str) else "attention"]
    total = 0
    for part, names in targets.items():
        pattern = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, names))})\.weight")
        for key, shape in weight_shapes(base.files[part]).items():
            if pattern.fullmatch(key):
                out, *rest = shape
                total += cfg.rank * (out + math.prod(rest)) + (out if cfg.use_dora else 0)
    return total


def checkpoint_bytes(cfg: Any, base: BaseInfo) -> int:
    """Bytes of one checkpoint: float32 weights, two moments, and the best LoRA so far."""
    return 4 * 4 * (lora_parameters(cfg, base) or 50_000_000)


def activation_bytes(cfg: Any, plan: Plan) -> int | None:
    """Bytes that the U-Net keeps for backward, per micro-batch of one process: an estimate.

    Counted per level of the U-Net as (resnets, transformers) x channels x latent pixels, with the number of
    tensors of that size that a resnet and a transformer block keep, by autograd's report (docs/LOG.md).
    """
    unet = plan.base.configs.get("unet")
    if not unet:
        return None
    width, height = max(plan.shapes, key=math.prod)
    pixels = width * height // plan.base.vae_factor**2
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    levels = zip(channels, unet["down_block_types"], reversed(unet["up_block_types"]), strict=True)
    elements = 0.0
    for level, (count, down, up) in enumerate(levels):
        here = count * pixels / 4**level
        last = level == len(channels) - 1  # the middle block counts with it
        resnets = layers + (layers + 1) + 2 * last
        transformers = ("Cross" in down) * layers + ("Cross" in up) * (layers + 1) + last
        elements += here * (RESNET_TENSORS * resnets + TRANSFORMER_TENSORS * transformers)
    half = cfg.mixed_precision in ("fp16", "bf16")
    scale = 0.25 if cfg.gradient_checkpointing else 1.0
    return int(elements * cfg.train_batch_size * (2 if half else 4) * scale)


RESNET_TENSORS = 10.0
TRANSFORMER_TENSORS = 25.0


def predict_memory(cfg: Any, plan: Plan) -> dict[str, int]:
    """Bytes on the training device by part, without the framework's own (about 0.5 GB with CUDA)."""
    parts = ("unet", "text_encoder") if cfg.train_text_encoder else ("unet",)
    frozen = sum(plan.base.parameters.get(part, 0) for part in parts)
    return {
        "frozen base": frozen * (2 if cfg.mixed_precision in ("fp16", "bf16") else 4),
        "LoRA, gradients, optimizer": (lora_parameters(cfg, plan.base) or 0) * 16,
        "activations": activation_bytes(cfg, plan) or 0,
    }


def describe_plan(cfg: Any, plan: Plan) -> str:
    """The plan in words, for --check."""
    base = plan.base
    lines = [f"base        {base.name} ({base.kind}), {_base_line(base)}"]
    lines += [f"            {part:13s} {path}" for part, path in base.files.items()]
    lines += _picture_lines(cfg, plan)
    lines += [f"tokens      {line}" for line in lost_tokens(cfg, plan)]
    epochs = plan.total_batch * plan.steps / len(plan.table.rows)
    elsewhere = "; ".join(f"on {n} processes {_steps_on(cfg, plan, n)}" for n in (2, 4))
    lines.append(
        f"steps       {plan.steps} of {plan.total_batch} sample(s): {epochs:.4g} epochs; {elsewhere}"
    )
    if base.kind != "hub" or base.known:
        vae_hash = weights_hash(base.files.get("vae") or base.files["file"])
        views = [view for row in training_views(cfg, plan) + validation_views(plan) for view in row]
        hits = sum(view.entry(plan.cache_dir, vae_hash).exists() for view in views)
        lines.append(f"cache       {hits} of {len(views)} latents are in {plan.cache_dir}")
    count = lora_parameters(cfg, base)
    size = f"{count:,} parameters" if count else "size not known before the base is here"
    lines.append(f"LoRA        rank {cfg.rank}, {size}")
    if base.known and base.configs:
        parts = predict_memory(cfg, plan)
        shown = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items())
        lines.append(f"memory      about {sum(parts.values()) / 1e6:,.0f} MB on the device ({shown})")
    lines.append(f"disk        {_disk_line(cfg, base)}")
    return "\n".join(lines + [f"note        {note}" for note in plan.notes])


def _picture_lines(cfg: Any, plan: Plan) -> Iterator[str]:
    rows, where = plan.table.rows, cfg.data_dir or cfg.dataset_name
    yield f"pictures    {len(rows)} from {where}; captions from {plan.table.caption_source}"
    for row, (width, height) in list(zip(rows, plan.shapes, strict=True))[:10]:
        caption = row.caption if len(row.caption) <= 50 else row.caption[:49] + "…"
        sizes = f"{row.width:5d}x{row.height:<5d} at {width}x{height}"
        yield f"            {row.name:24.24s} {sizes}  {caption!r}"
    if len(rows) > 10:
        yield f"            … and {len(rows) - 10} more"
    buckets = Counter(plan.shapes)
    if len(buckets) > 1:
        yield "buckets     " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(buckets.items()))
    if plan.validation:
        yield f"validation  {len(plan.validation.rows)} from {cfg.validation_data_dir}"


def _disk_line(cfg: Any, base: BaseInfo) -> str:
    size, kept = checkpoint_bytes(cfg, base), cfg.checkpoints_total_limit
    free = shutil.disk_usage(_existing(Path(cfg.output_dir))).free
    return (
        f"{size * kept / 1e6:,.1f} MB for {kept} checkpoints, {size / 4e6:,.1f} MB for the LoRA; "
        f"{free / 1e9:,.1f} GB free"
    )


def _existing(path: Path) -> Path:
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


def _base_line(base: BaseInfo) -> str:
    if not base.known:
        return "its parts are read when training starts"
    millions = sum(base.parameters.values()) / 1e6
    return (
        f"{millions:,.1f} M parameters, {base.resolution} px, VAE factor {base.vae_factor}, "
        f"{base.max_tokens} tokens, {base.prediction_type}"
    )


def _steps_on(cfg: Any, plan: Plan, processes: int) -> str:
    if cfg.total_batch_size:
        return str(plan.steps)
    total = plan.total_batch // plan.world_size * processes
    epochs = math.inf if cfg.n_epochs is None else math.ceil(cfg.n_epochs * len(plan.table.rows) / total)
    return str(int(min(epochs, cfg.max_train_steps or math.inf)))


def lost_tokens(cfg: Any, plan: Plan) -> list[str]:
    """Captions that are longer than the text encoder reads, with the words that it will not see."""
    folder = plan.base.root / "tokenizer" if plan.base.root and plan.base.kind != "file" else None
    if folder is None:
        return []
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    limit = min(tokenizer.model_max_length, plan.base.max_tokens)
    found = []
    for row in plan.table.rows:
        ids = tokenizer(row.caption, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
            found.append(f"{row.line}: {len(ids)} tokens, {limit} are read; lost: {lost!r}")
    return found[:20] + ([f"and {len(found) - 20} more"] if len(found) > 20 else [])
