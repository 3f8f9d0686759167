"""The page of a training run: its losses, its samples, what was trained, and how to use it. No torch here.

All of it follows from the files of the run, so that it is the same however often the run was interrupted.
"""

import hashlib
import html
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorakit.ground.errors import UserError
from lorakit.ground.publish import publish_file
from lorakit.pictures.images import load_image
from lorakit.pictures.page import as_json, command, data_uri, facts, finite, page, setting, shell, webp
from lorakit.training.forecast import lora_parameters, showings
from lorakit.training.lcm_config import teacher_loras
from lorakit.training.plan import Plan, result_paths
from lorakit.training.words_config import trains_lora, word_paths
from lorakit.weights.programs import file_read_by

log = logging.getLogger(__name__)
POINTS = 400  # of a curve
SAMPLES = 240  # pictures in the page
THUMBS, SIDE = 24, 160  # pictures of the data, and pixels of their longer side
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
OF_THE_START = ("resume_from_checkpoint", "overwrite")
"""Keys that say how a run was begun, and nothing of what it is."""

Points = list[tuple[int, float]]


def write_page(cfg: Any, plan: Plan, run: Path, hint: str = "") -> None:
    """Write index.html. A failure is a warning: the run's own files are whole.

    Args:
        hint: the command that goes on, where the run was stopped.
    """
    try:
        publish_file(run / "index.html", run_page(cfg, plan, run, hint).encode())
    except Exception as error:  # a picture that is gone, a full disk
        log.warning("no index.html: %s: %s", type(error).__name__, error)


def run_page(cfg: Any, plan: Plan, run: Path, hint: str = "") -> str:
    """A self-contained page of the run in the folder `run`."""
    curves = read_curves(run / "metrics.jsonl")
    done = max((step for step, _ in curves["loss"]), default=0)
    best = min(curves["validation"], key=lambda point: point[1], default=None)
    rows = plan.table.rows
    more = f"<small>and {len(rows) - THUMBS} more</small>" if len(rows) > THUMBS else ""
    config = cfg.model_dump(mode="json", exclude=set(OF_THE_START))
    texts = {
        "trained": facts(_trained(cfg, plan, done, best)),
        "file": facts(_file(cfg, done, best) if not hint else {"state": "stopped; a checkpoint is kept"}),
        "use_title": "To go on" if hint else "To use it",
        "use": command(hint) if hint else "".join(_use(cfg, plan)),
        "pictures": "".join(_thumbs(rows[:THUMBS])),
        "more": more,
        "settings": as_json(config),
    }
    stride = max(1, -(-len(curves["loss"]) // POINTS))
    data = {
        "samples": _samples(run / "samples"),
        "loss": _thinned(curves["loss"], stride),
        "smoothed": curves["smoothed"][::-1][::stride][::-1],
        "validation": curves["validation"],
        "stride": stride,
        "first": "teacher" if teacher_loras(cfg) else "without LoRA" if trains_lora(cfg) else "before",
        "done": done,
        "best": best and best[0],
    }
    state = f"stopped at step {done} of {plan.steps}" if hint else f"{done} steps"
    if not hint and done < plan.steps:
        state += f" of {plan.steps}, ended early by the validation loss"
    kind, rank = ("LoRA", f" · rank {cfg.rank}") if trains_lora(cfg) else ("Words", "")
    summary = f"{state} · {len(rows)} picture{'s' * (len(rows) > 1)}{rank} · {plan.base.name}"
    return page(Path(__file__).with_suffix(""), f"{kind}: {cfg.ckpt_name}", summary, texts, data)


# ---- curves and samples ----


def read_curves(path: Path) -> dict[str, Points]:
    """What metrics.jsonl has of the loss, its running mean and the validation loss, as (step, value)."""
    keys = {"loss": "loss", "loss_smoothed": "smoothed", "validation_loss": "validation"}
    curves: dict[str, Points] = {name: [] for name in keys.values()}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        record = json.loads(line)
        for key, name in keys.items():
            if (value := finite(record.get(key))) is not None:
                curves[name].append((record["step"], value))
    return curves


def _thinned(points: Points, stride: int) -> Points:
    """The mean of each `stride` points, at the last of them."""
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _samples(folder: Path) -> dict[str, Any]:
    """Steps, and for each prompt and seed a label and its pictures; the first step is without LoRA."""
    paths = sorted(path for path in folder.glob("????????-*.png") if path.name[:8].isdigit())
    steps = sorted({int(path.name[:8]) for path in paths})
    if len(steps) < 2:
        return {"steps": [], "rows": []}
    asked = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    labels = [f"{prompt} · seed {seed}" for prompt in asked["prompts"] for seed in asked["seeds"]]
    most = max(2, SAMPLES // len(labels))
    if len(steps) > most:  # evenly spaced, both ends among them
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    by_place = {(int(path.name[:8]), int(path.stem[9:])): path for path in paths}
    rows = [
        {"label": label, "pictures": [_encoded(by_place.get((step, number))) for step in steps]}
        for number, label in enumerate(labels)
    ]
    return {"steps": steps, "rows": rows}


def _encoded(path: Path | None) -> str | None:
    return None if path is None else data_uri(webp(load_image(path)))


# ---- what was trained, and the file ----


def _trained(cfg: Any, plan: Plan, done: int, best: tuple[int, float] | None) -> dict[str, Any]:
    count, where = len(plan.table.rows), cfg.data_dir or cfg.dataset_name
    shapes = sorted({f"{width}x{height}" for width, height in plan.shapes})
    number = lora_parameters(cfg, plan.base)
    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else ", ".join(cfg.target_modules)
    rows = {
        "pictures": f"{count} from {where}, at {', '.join(shapes[:4])}{', …' * (len(shapes) > 4)}",
        "captions": f"from {plan.table.caption_source}",
        "shown": showings(cfg, replace(plan, steps=done)),
        "steps": f"{done} of {plan.total_batch} picture(s), learning rate {cfg.learning_rate:g}",
        "LoRA": f"rank {cfg.rank}, alpha {cfg.lora_alpha or cfg.rank:g}, {targets}"
        + (f", {number:,} parameters" if number else "")
        if trains_lora(cfg)
        else None,
        "base": f"{plan.base.name}, {cfg.prediction_type or plan.base.prediction_type}",
    }
    if best:
        rows["validation"] = f"best loss {best[1]:.4f} at step {best[0]}"
        rows["validation"] += f", {len(plan.validation.rows)} pictures" if plan.validation else ""
    rows["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    )
    return rows


def _file(cfg: Any, done: int, best: tuple[int, float] | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    is_best = cfg.final_weights == "best" and best is not None
    for path, layout in result_paths(cfg).items():
        content = path.read_bytes()
        rows["file"] = f"{path}, {len(content) / 1e6:.2f} MB, {cfg.save_dtype}, {layout} layout"
        rows["sha256"] = hashlib.sha256(content).hexdigest()
        with suppress(UserError):  # of a file that is no LoRA any more, size and hash alone
            rows["read by"] = file_read_by(path)
        if layout == "kohya":
            break
    rows["holds"] = f"step {best[0]}, the lowest validation loss" if is_best and best else f"step {done}"
    for word, path in word_paths(cfg).items():
        rows[f"word {word}"] = f"{path}, {path.stat().st_size / 1e3:.1f} kB"
    if cfg.trigger_word:
        rows["trigger word"] = cfg.trigger_word
    if cfg.clip_skip:
        rows["clip skip"] = cfg.clip_skip
    return rows


def _use(cfg: Any, plan: Plan) -> Iterator[str]:
    """Commands, each behind what it is for."""
    files = result_paths(cfg)
    prompt = (cfg.sample_prompts or [plan.table.rows[0].caption])[0]
    loras = [lora.path for lora in cfg.base_loras] + [str(path) for path in files][:1]
    words = [setting(f"loras.{number}.path", each) for number, each in enumerate(loras)]
    words += [
        setting(f"loras.{number}.weight", lora.weight)
        for number, lora in enumerate(cfg.base_loras)
        if lora.weight != 1
    ]
    keys = ("pretrained_model_name_or_path", "base_config", "prediction_type", "clip_skip")
    fields = type(cfg).model_fields
    words += [setting(key, getattr(cfg, key)) for key in keys if getattr(cfg, key) != fields[key].default]
    if learnt := word_paths(cfg):
        folders = sorted({str(path.parent) for path in learnt.values()})
        words += [setting("prompt_syntax", "a1111"), setting("embedding_dirs", folders)]
    start = ["python", "generate.py", setting("prompt", prompt), *words]
    yield "<p>Pictures with it:</p>" + command(shell([*start, setting("name", f"{cfg.ckpt_name}_samples")]))
    if not files:
        return
    path, layout = next(iter(files.items()))
    grid = ["grid.weight=[0,0.5,1]", setting("name", f"{cfg.ckpt_name}_weights")]
    yield "<p>The same at three weights, side by side:</p>" + command(shell([*start, *grid]))
    yield "<p>What is in the file:</p>" + command(shell(["python", "mix_lora.py", "inspect", str(path)]))
    yield "<p>In diffusers:</p>" + command(f"pipe.load_lora_weights({json.dumps(str(path))})")
    if layout == "kohya":
        yield (
            "<p>A1111 looks for it in models/Lora, ComfyUI in models/loras; in a prompt of A1111 it is</p>"
        ) + command(f"<lora:{cfg.ckpt_name}:1>")


def _thumbs(rows: Sequence[Any]) -> Iterator[str]:
    for row in rows:
        uri = data_uri(webp(load_image(row.source), SIDE))
        repeats = f" · {row.repeats} repeats" if row.repeats > 1 else ""
        yield (
            f'<figure><img src="{uri}" alt=""><figcaption>{html.escape(row.caption)}<br>'
            f'<span class="soft">{html.escape(row.name)}{repeats}</span></figcaption></figure>'
        )
