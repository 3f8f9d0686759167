"""What a morph will do, worked out from its config and from files' headers. No torch here."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from lorakit.diffusion.inversion_plan import FIT_TIMESTEPS, inversion_evaluations
from lorakit.film.config import MorphConfig
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import existing_parent
from lorakit.pictures.animation import missing_writers
from lorakit.pictures.images import image_size
from lorakit.sampling.fitting import missing_loras
from lorakit.sampling.prompts import text_notes
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import check_clip_skip, clip_skip_notes
from lorakit.weights.few_steps import refuse_few_steps
from lorakit.weights.identity import base_identity, file_sha256, lora_sha256
from lorakit.weights.learnt_words import word_hashes

Shape = tuple[int, int]
VERSION = 2  # of what frames are a function of; counts up when the same config gives other frames
# What only shows frames, or says where they go.
PRESENTATION = {
    "output_dir", "name", "overwrite", "cache_dir", "formats", "fps", "hold_ms", "pingpong", "min_side",
    "train_if_missing", "fit_config", "compare",
}  # fmt: skip


@dataclass(frozen=True)
class MorphPlan:
    """`shape` is (width, height) in pixels; `segments` lie between pictures; `total` counts all frames.

    `loras` are the files in use, each once; `missing` those of them that are to be trained first.
    """

    base: BaseInfo
    shape: Shape
    segments: int
    total: int
    loras: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.base.vae_factor
        return self.base.latent_channels, self.shape[1] // factor, self.shape[0] // factor


def make_morph_plan(cfg: MorphConfig, base: BaseInfo | None = None) -> MorphPlan:
    """Check base, pictures, LoRA files and writers, and count the frames.

    Args:
        base: what is known of the base once it is loaded; None: what its files tell.

    Raises:
        UserError: what is missing, unreadable or does not fit together; names the key and the remedy.
    """
    base = base or inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_clip_skip(base, cfg.clip_skip)
    shape = cfg.width or base.resolution, cfg.height or base.resolution
    for key, side in zip(("width", "height"), shape, strict=True):
        if side % base.vae_factor:
            raise UserError(f"{key} {side}: must divide by the base's VAE factor, {base.vae_factor}")
    notes = [*base.notes, *_picture_notes(cfg, shape)]
    loras = tuple(cfg.loras())
    missing = missing_loras(loras, cfg.train_if_missing, cfg.fit_config)
    for path in (present := [path for path in loras if path not in missing]):
        refuse_few_steps(path)
    texts = [(text, "prompt") for text in cfg.texts()]
    notes += text_notes(texts, cfg.prompt_syntax, cfg.embedding_dirs, base, present)
    notes += clip_skip_notes(cfg.clip_skip, present)
    for name, reason in missing_writers(cfg.formats).items():
        raise UserError(f'formats: "{name}" cannot be written: {reason}; or leave it out')
    if cfg.distance == "lpips":
        _need_lpips()
    if not (parent := existing_parent(Path(cfg.output_dir))).is_dir():
        raise OutputError(f"output_dir {cfg.output_dir}: {parent} is a file; choose another folder")
    segments = len(cfg.images) - (0 if cfg.loop else 1)
    total = segments * (cfg.frames - 1) + (0 if cfg.loop else 1)
    return MorphPlan(base, shape, segments, total, loras, missing, tuple(notes))


def _picture_notes(cfg: MorphConfig, shape: Shape) -> list[str]:
    notes = []
    for i, picture in enumerate(cfg.images):
        width, height = image_size(picture.path)
        if width * shape[1] != height * shape[0]:
            notes.append(f"images.{i}: {picture.path}, {width}x{height}, is cut to {shape[0]}x{shape[1]}")
        if min(width / shape[0], height / shape[1]) < 0.5:
            notes.append(f"images.{i}: {picture.path} is less than half as large as the frames: soft frames")
    return notes


def _need_lpips() -> None:
    import importlib.util

    if importlib.util.find_spec("lpips") is None:
        raise UserError('distance "lpips" needs a package: pip install lpips; "vae" needs none')


# ---- counting ----


def probe_stride(cfg: MorphConfig) -> int:
    """Every how-many-th node of the grid a probe passes."""
    return math.ceil(cfg.num_inference_steps / cfg.probe_steps)


def probe_rounds(cfg: MorphConfig) -> list[int]:
    """Inner positions of a segment per round of the probe: evenly spread ones, then where gaps are large."""
    inner = cfg.probe_points - 2
    first = max(1, (inner - 1) // 2)
    return [first, inner - first] if inner > first else [first]


def count_evaluations(cfg: MorphConfig, plan: MorphPlan) -> dict[str, int]:
    """U-Net evaluations of one row, by part of the work; guidance above 1 takes two for a row.

    fixed_point may need fewer: a row's search ends when it gets no better.
    """
    steps, ends, halves = cfg.num_inference_steps, len(cfg.images), 1 + (cfg.guidance_scale != 1)
    inversion = inversion_evaluations(steps, cfg.inversion_method, cfg.fixed_point_iterations)
    counts = {"inversion": ends * inversion * (1 + (cfg.inversion_guidance_scale != 1))}
    if plan.loras:
        counts["fit of the LoRAs"] = ends * (1 + len(plan.loras)) * len(FIT_TIMESTEPS)
    if cfg.reschedule in ("probe", "full"):
        coarse = math.ceil(steps / probe_stride(cfg))
        rows = sum(inner * plan.segments + ends for inner in probe_rounds(cfg))
        counts["probe"] = rows * coarse * halves
    inner = plan.total - ends
    if cfg.reschedule == "select":  # 2 (frames - 1) steps to a segment
        inner = plan.segments * (2 * cfg.frames - 3)
    passes = 2 if cfg.reschedule == "full" else 1
    counts["frames"] = passes * (inner + ends) * steps * halves
    return counts


def attention_bytes(cfg: MorphConfig, plan: MorphPlan, element: int = 4) -> int | None:
    """Keys and values of one step, of all pictures, in the blocks that share attention."""
    unet = plan.base.configs.get("unet")
    if cfg.attention == "off" or not unet:
        return 0 if unet else None
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    _, height, width = plan.latent_shape
    last = len(channels) - 1

    def blocks(types: list[str], count: int, level_of) -> int:
        levels = [level_of(i) for i, kind in enumerate(types) if "Cross" in kind]
        return sum(count * channels[level] * _tokens(height, width, level) for level in levels)

    numbers = 0
    if "down" in cfg.attention_blocks:
        numbers += blocks(unet["down_block_types"], layers, lambda i: i)
    if "mid" in cfg.attention_blocks:
        numbers += channels[last] * _tokens(height, width, last)
    if "up" in cfg.attention_blocks:
        numbers += blocks(unet["up_block_types"], layers + 1, lambda i: last - i)
    halves = 1 + (cfg.guidance_scale != 1)
    return 2 * numbers * len(cfg.images) * halves * element


def _tokens(height: int, width: int, level: int) -> int:
    for _ in range(level):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height * width


def predict_memory(cfg: MorphConfig, plan: MorphPlan, half: bool = False) -> dict[str, int] | None:
    """Bytes on the device by part, without the framework's own; None where the base is not known.

    What a pass of the U-Net holds at its peak is taken as the skip connections and eight tensors of its
    widest level for each row: within a factor of two, as measured in docs/LOG.md.
    """
    unet = plan.base.configs.get("unet")
    if not unet or not plan.base.parameters:
        return None
    element = 2 if half else 4
    _, height, width = plan.latent_shape
    rows = min(cfg.batch_size, max(plan.total, len(cfg.images))) * (1 + (cfg.guidance_scale != 1))
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    planes = [count * _tokens(height, width, level) for level, count in enumerate(channels)]
    parameters = plan.base.parameters
    return {
        "base": sum(parameters[part] for part in ("unet", "text_encoder")) * element + parameters["vae"] * 4,
        "one pass of the U-Net": rows * element * ((layers + 1) * sum(planes) + 8 * max(planes)),
        "shared attention": attention_bytes(cfg, plan, element) or 0,
        "paths": (cfg.num_inference_steps + 1) * len(cfg.images) * math.prod(plan.latent_shape) * 4,
    }


def describe_morph(cfg: MorphConfig, plan: MorphPlan) -> str:
    """The plan in words, for --check."""
    base = plan.base
    about = f"VAE factor {base.vae_factor}, {base.prediction_type}" if base.known else "read when work starts"
    lines = [f"base        {base.name} ({base.kind}), {about}"]
    for i, picture in enumerate(cfg.images):
        width, height = image_size(picture.path)
        lora = f"{picture.lora} x {picture.lora_weight:g}" if picture.lora else "no LoRA"
        lines.append(f"picture {i:3d} {picture.path} ({width}x{height}), {lora}, {picture.prompt!r}")
    lines += [f"to train    {path}, with {cfg.fit_config}" for path in plan.missing]
    around = " and back to the first" if cfg.loop else ""
    lines.append(
        f"frames      {plan.total} of {plan.shape[0]}x{plan.shape[1]}, {cfg.frames} from picture to picture"
        f"{around}"
    )
    counts = count_evaluations(cfg, plan)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    twice = "; the same again without LoRA for compare" if cfg.compare else ""
    lines.append(f"U-Net       {sum(counts.values()):,} evaluations ({parts}){twice}")
    for half in {"no": (False,), "auto": (False, True)}.get(cfg.mixed_precision, (True,)):
        if memory := predict_memory(cfg, plan, half):
            shown = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in memory.items())
            kind = "half precision" if half else "float32"
            lines.append(f"memory      about {sum(memory.values()) / 1e6:,.0f} MB in {kind} ({shown})")
    lines.append(
        f"writes      {Path(cfg.output_dir) / cfg.name}: PNG frames, sheet, report, page"
        f"{''.join(f', {name}' for name in cfg.formats)}"
    )
    return "\n".join(lines + [f"note        {note}" for note in plan.notes])


# ---- identity ----


def words_of(cfg: MorphConfig) -> dict[str, str]:
    """Learnt words in the prompts, by name, and the hashes of their files."""
    if cfg.prompt_syntax == "plain":
        return {}
    return word_hashes(cfg.texts(), cfg.embedding_dirs, cfg.loras())


def fingerprint(cfg: MorphConfig, plan: MorphPlan, dtype: str, loras: bool = True) -> str:
    """A hash of all that the frames are a function of: settings and the content of every file."""
    settings = {key: value for key, value in cfg.model_dump(mode="json").items() if key not in PRESENTATION}
    settings["images"] = [
        {
            "picture": file_sha256(picture.path),
            "prompt": picture.prompt,
            "lora": lora_sha256(picture.lora) if picture.lora and loras else None,
            "lora_weight": picture.lora_weight,
        }
        for picture in cfg.images
    ]
    settings |= {"shape": plan.shape, "base": base_identity(plan.base), "dtype": dtype, "version": VERSION}
    settings["words"] = words_of(cfg)
    for key in ("pretrained_model_name_or_path", "base_config", "embedding_dirs"):
        del settings[key]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
