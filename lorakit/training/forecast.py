"""What a run will need, and the plan in words for --check. No torch here."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.ground.publish import existing_parent
from lorakit.ground.shards import Shards
from lorakit.pictures.views import Shape
from lorakit.sampling.forecast import LIBRARIES, TRANSFORMER_TENSORS, backward_bytes, halves_of
from lorakit.sampling.prompts import text_notes
from lorakit.training.class_pictures import shows_class
from lorakit.training.motion_config import adapter_of
from lorakit.training.objective_config import kinds_of, prompts_of
from lorakit.training.order import count_showings
from lorakit.training.plan import Plan, count_steps, training_views, validation_views
from lorakit.training.smooth_config import smooth_settings
from lorakit.training.words_config import encodes_text, trains_lora, word_paths
from lorakit.weights.base import BaseInfo
from lorakit.weights.base_settings import base_line, text_layers
from lorakit.weights.identity import base_identity
from lorakit.weights.lora_file import TARGET_PRESETS, ends_in
from lorakit.weights.tokens import overlong, unread_notes

HELD_BYTES = 1 << 24
"""What is kept of each cache, of latents, masks and text states; the rest is read as steps need it."""


def lora_parameters(cfg: Any, base: BaseInfo) -> int | None:
    """How many numbers are trained, counted in the headers of the base's weights; None without them."""
    if not base.known:
        return None
    unet, text = TARGET_PRESETS["unet"], TARGET_PRESETS["text_encoder"]
    chosen: str | tuple[str, ...] = cfg.target_modules
    targets = {"unet": unet[chosen] if isinstance(chosen, str) else chosen}
    if not trains_lora(cfg):
        return 0
    if cfg.train_text_encoder:
        targets["text_encoder"] = text[chosen if isinstance(chosen, str) else "attention"]
    total, layers = 0, text_layers(base, cfg.clip_skip)
    adapter = adapter_of(cfg, base)
    for part, ends in targets.items():
        more = adapter.shapes if adapter and part == "unet" else {}
        for key, shape in (base.shapes(part) | more).items():
            number = re.search(r"\blayers\.(\d+)\.", key)  # of the text encoder's alone
            name, _, kind = key.rpartition(".")
            is_adapted = kind == "weight" and any(ends_in(name, end) for end in ends)
            if is_adapted and (number is None or int(number[1]) < layers):
                out, *rest = shape
                total += cfg.rank * (out + math.prod(rest)) + (out if cfg.use_dora else 0)
    return total


def checkpoint_bytes(cfg: Any, base: BaseInfo) -> int:
    """Bytes of one checkpoint: float32 weights, two moments, and where losses are validated the best LoRA."""
    copies = 3 if cfg.validation_steps == 0 else 4
    count = lora_parameters(cfg, base)
    return copies * 4 * (50_000_000 if count is None else count)


def activation_bytes(cfg: Any, plan: Plan, half: bool = False) -> int | None:
    """Bytes that the U-Net keeps for backward, per micro-batch of one process: an estimate."""
    rows = cfg.train_batch_size + (math.ceil(cfg.train_batch_size / cfg.prior.every) if cfg.prior else 0)
    twice = 0
    if any(kind.double_backward for kind in kinds_of(cfg)):
        twice = math.ceil(cfg.train_batch_size / smooth_settings(cfg).every)
    shape = max(plan.shapes, key=math.prod)
    if cfg.motion:
        rows *= cfg.motion.frames
    kept = backward_bytes(plan.base, shape, rows, half, twice=twice)
    if kept is not None and plan.adapter:
        kept += _temporal_bytes(plan, shape, rows, half)
    scale = 0.25 if cfg.gradient_checkpointing else 1.0  # a fifth is kept, and one block made anew
    return None if kept is None else int(kept * scale)


def _temporal_bytes(plan: Plan, shape: tuple[int, int], rows: int, half: bool) -> int:
    """What a motion adapter keeps: at each resnet of the base a transformer block of its width."""
    assert plan.adapter is not None
    unet, elements = plan.base.configs["unet"], 0.0
    pixels = math.prod(shape) / plan.base.vae_factor**2
    for level, channels in enumerate(unet["block_out_channels"]):
        elements += (2 * unet["layers_per_block"] + 1) * channels * pixels / 4**level
    elements += plan.adapter.config["use_motion_mid_block"] * channels * pixels / 4**level
    return int(TRANSFORMER_TENSORS * elements * rows * (2 if half else 4))


def predict_memory(cfg: Any, plan: Plan, half: bool = False) -> dict[str, int]:
    """Bytes on the training device by part; weights' files that are read beside it are not among them."""
    parts = ("unet", "text_encoder") if encodes_text(cfg) else ("unet",)
    frozen = sum(plan.base.parameters.get(part, 0) for part in parts)
    frozen += sum(map(math.prod, plan.adapter.shapes.values())) if plan.adapter else 0
    return {
        "frozen base": frozen * (2 if half else 4),
        "LoRA, gradients, optimizer": (lora_parameters(cfg, plan.base) or 0) * 16,
        "activations": activation_bytes(cfg, plan, half) or 0,
        "libraries": LIBRARIES,
    }


def cache_bytes(cfg: Any, plan: Plan, shapes: Sequence[Shape]) -> tuple[int, int]:
    """Bytes of the latents of views of these shapes, and of the text states of all captions, on the disk.

    What each entry has beside its numbers, 200 bytes or so, is not among them.
    """
    base, size = plan.base, {"float32": 4}.get(cfg.cache_dtype, 2)
    frames = cfg.motion.frames if cfg.motion else 1
    numbers = sum(times * math.prod(shape) for shape, times in Counter(shapes).items()) // base.vae_factor**2
    tables = (plan.table, *([plan.validation] if plan.validation else []))
    captions = {caption for table in tables for row in table.rows for caption in row.captions}
    states = 0 if encodes_text(cfg) else len(captions | {""}) * base.max_tokens * base.cross_attention_dim
    return 2 * base.latent_channels * numbers * frames * size, states * size


def describe_plan(cfg: Any, plan: Plan) -> str:
    """The plan in words, for --check."""
    base = plan.base
    lines = [f"base        {base.name} ({base.kind}), {base_line(base)}"]
    lines += [f"            {part:13s} {path}" for part, path in base.files.items()]
    lines += _picture_lines(cfg, plan)
    lines += [f"tokens      {line}" for line in lost_tokens(cfg, plan)]
    epochs = plan.order["showings"] / sum(plan.repeats)
    elsewhere = "; ".join(f"on {n} processes {_steps_on(cfg, plan, n)}" for n in (2, 4))
    lines.append(
        f"steps       {plan.steps} of {plan.total_batch} sample(s): {epochs:.4g} epochs; {elsewhere}"
    )
    lines.append(f"shown       {showings(cfg, plan)}")
    if base.known:
        vae_hash = base_identity(base, "vae")
        rows = [*training_views(cfg, plan), *validation_views(cfg, plan)]
        views = [view for row in rows for view in row]
        cached = Shards(plan.cache_dir / "latents")
        hits = sum(view.entry(vae_hash, cfg.cache_dtype) in cached for view in views)
        held = f"a run holds {HELD_BYTES / 1e6:,.0f} MB of latents, and of text states, at most"
        lines.append(f"cache       {hits} of {len(views)} latents are in {plan.cache_dir}; {held}")
        latents, texts = cache_bytes(cfg, plan, [view.shape for view in views])
        sizes = f"{latents / 1e6:,.1f} MB, that of text states {texts / 1e6:,.1f} MB"
        lines.append(f"            the cache of all takes {sizes}")
    count = lora_parameters(cfg, base)
    size = "size not known before the base is here" if count is None else f"{count:,} parameters"
    lines.append(f"LoRA        rank {cfg.rank}, {size}" if trains_lora(cfg) else "LoRA        none")
    for word, path in word_paths(cfg).items():
        start = cfg.textual_inversion.words[word]
        lines.append(f"word        {word}, {cfg.textual_inversion.vectors} vector(s) from {start!r}: {path}")
    if base.known:
        for half in halves_of(cfg.mixed_precision):
            parts = predict_memory(cfg, plan, half)
            shown = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items())
            total = f"about {sum(parts.values()) / 1e6:,.0f} MB in {'half precision' if half else 'float32'}"
            lines.append(f"memory      {total} ({shown})")
        mapped = sum(path.stat().st_size for path in set(base.files.values())) / 1e6
        lines.append(f"            beside it {mapped:,.0f} MB of files, mapped only while they are read")
    lines.append(f"disk        {_disk_line(cfg, base)}")
    return "\n".join(lines + [f"note        {note}" for note in plan.notes])


def _picture_lines(cfg: Any, plan: Plan) -> Iterator[str]:
    rows, where = plan.table.rows, cfg.data_dir or cfg.dataset_name or cfg.motion.clips_dir
    yield f"pictures    {len(rows)} from {where}; captions from {plan.table.caption_source}"
    for row, (width, height) in list(zip(rows, plan.shapes, strict=True))[:10]:
        caption = row.caption if len(row.caption) <= 50 else row.caption[:49] + "…"
        sizes = f"{row.width:5d}x{row.height:<5d} at {width}x{height}"
        others = f" and {len(row.others)} more" if row.others else ""
        yield f"            {row.name:24.24s} {sizes}  {caption!r}{others}"
    if len(rows) > 10:
        yield f"            … and {len(rows) - 10} more"
    buckets = Counter(plan.shapes)
    if len(buckets) > 1:
        yield "buckets     " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(buckets.items()))
    if cfg.motion:
        settings = cfg.motion
        each = f"{len(settings.cameras())} camera(s)" if settings.camera else "their own frames"
        kind = f"{each}, {settings.takes} take(s) at most of {settings.frames} frames"
        yield f"clips       {kind}; adapter {settings.motion_adapter}"
    if plan.class_table:
        yield f"class       {len(plan.class_table.rows)} pictures from {cfg.prior.class_data_dir}"
    elif shows_class(cfg):
        prior = cfg.prior
        yield f"class       {prior.class_images} pictures of {prior.class_prompt!r}, made by the base once"
    if plan.validation:
        yield f"validation  {len(plan.validation.rows)} from {cfg.validation_data_dir}"


def _disk_line(cfg: Any, base: BaseInfo) -> str:
    size, kept = checkpoint_bytes(cfg, base), cfg.checkpoints_total_limit
    free = shutil.disk_usage(existing_parent(Path(cfg.output_dir))).free
    return (
        f"{size * kept / 1e6:,.1f} MB for {kept} checkpoints, {size / 4e6:,.1f} MB for the LoRA; "
        f"{free / 1e9:,.1f} GB free"
    )


def _steps_on(cfg: Any, plan: Plan, processes: int) -> int:
    total = plan.total_batch if cfg.total_batch_size else plan.total_batch // plan.world_size * processes
    return count_steps(cfg, sum(plan.repeats), total)


def showings(cfg: Any, plan: Plan) -> str:
    """How often the run shows the pictures, by their repeats."""
    counts, repeats = count_showings(cfg.seed, **plan.order), plan.repeats
    said = []
    for number in sorted(set(repeats)):
        own = [int(count) for count, each in zip(counts, repeats, strict=True) if each == number]
        times = f"{min(own)} to {max(own)}" if min(own) < max(own) else f"{own[0]}"
        whose = f"{len(own)} picture(s) with {number} repeats" if len(set(repeats)) > 1 else "each picture"
        said.append(f"{whose} {times} times")
    return ", ".join(said)


def lost_tokens(cfg: Any, plan: Plan) -> list[str]:
    """Captions longer than the text encoder reads, with the words that it will not see, and samples' prompts.

    Raises:
        UserError: sample_prompts have marks that cannot be read.
    """
    texts = [(row.line, caption) for row in plan.table.rows for caption in row.captions]
    by_line = {  # the first of those that stand in one place
        texts[index][0]: f"{texts[index][0]}: {tokens} tokens, {limit} are read; lost: {words!r}"
        for index, tokens, limit, words in reversed(overlong(plan.base, [caption for _, caption in texts]))
    }
    found = list(reversed(by_line.values()))
    more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
    own = unread_notes(plan.base, prompts_of(cfg))
    samples = [(prompt, "sample_prompts") for prompt in cfg.sample_prompts or ()]
    return found[:20] + more + own + text_notes(samples, cfg.prompt_syntax, cfg.embedding_dirs, plan.base)
