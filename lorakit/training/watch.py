"""What is seen of a run while it trains: metrics, validation loss, sample sheets. None of it alters the run.

The loss of one random timestep is noise. What is shown is a running mean, and what judges is the loss at
fixed timesteps with fixed noise.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.lora import lora_disabled, only_adapters
from lorakit.diffusion.models import Base, evaluating
from lorakit.diffusion.words import words_at_start
from lorakit.ground.publish import publish_file
from lorakit.ground.runs import MetricsFile
from lorakit.pictures.images import load_image, save_png
from lorakit.pictures.sheet import contact_sheet
from lorakit.sampling.samplers import make_scheduler, sample_images
from lorakit.training.data import TrainingData
from lorakit.training.lcm_config import TEACHER
from lorakit.training.objectives import Models, Objective, Parts, as_function

log = logging.getLogger(__name__)
SMOOTHING = 0.98  # of the running mean, per step
MAX_COLUMNS = 8  # of a sample sheet, besides those without LoRA
WITHOUT, FEW_STEPS = "00000000", "few-step"  # the names of its columns without LoRA; others are steps


@dataclass(frozen=True)
class Broken:
    """A step whose loss or gradient is not finite, and which parts of the loss, where it has parts."""

    step: int
    parts: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return f"the loss of {', '.join(self.parts)}" if self.parts else "the loss or its gradient"


class Metrics:
    """Losses and gradient norms, fetched from the device every few steps only, so that no step waits.

    Args:
        accelerator: reduces over processes and forwards to trackers.
        path: metrics.jsonl.
        bar: a tqdm bar.
        images: pictures per step.
        smoothed: the running mean so far, from a checkpoint.
    """

    def __init__(self, accelerator, path: Path, bar, images: int, smoothed: float | None = None):
        self.accelerator, self.file, self.bar, self.images = accelerator, MetricsFile(path), bar, images
        self.smoothed = smoothed
        self.overflows = 0  # in a row; the fp16 scaler skips such steps
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []
        self.parts: list[str] = []  # of the loss, by name
        self.since = time.perf_counter()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, parts: Parts | None = None) -> None:
        """Keep one step's figures; `parts` of the loss are the same names in every step."""
        self.parts = list(parts or ())
        losses = torch.stack([each.detach().float() for each in (loss, *(parts or {}).values())])
        self.pending.append((step, losses, grad_norm.detach(), lr))

    def flush(self) -> Broken | None:
        """Write what is pending. Return the first step whose loss or gradient is not finite, if any."""
        if not self.pending:
            return None
        losses = self.accelerator.reduce(torch.stack([p[1] for p in self.pending]), "mean").tolist()
        norms = torch.stack([p[2].float() for p in self.pending]).tolist()
        now = time.perf_counter()
        rate = len(self.pending) * self.images / max(now - self.since, 1e-9)
        broken = None
        for (step, _, _, lr), (loss, *parts), norm in zip(self.pending, losses, norms, strict=True):
            told = dict(zip(self.parts, parts, strict=True))
            self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
            if not math.isfinite(loss) or self.overflows > (0 if self.accelerator.scaler is None else 10):
                broken = Broken(step, tuple(name for name, part in told.items() if not math.isfinite(part)))
                break
            keep = min(SMOOTHING, 1 - 1 / step)  # at first a plain mean, in which no loss weighs more
            self.smoothed = keep * (self.smoothed or 0.0) + (1 - keep) * loss
            record = {"step": step, "loss": loss, "loss_smoothed": self.smoothed, "grad_norm": norm, "lr": lr}
            self.write(
                record | {f"loss/{name}": part for name, part in told.items()} | {"images_per_second": rate}
            )
        self.bar.update(len(self.pending))
        self.bar.set_postfix_str(f"loss {self.smoothed or math.nan:.4f}, {rate:.1f} images/s")
        self.pending, self.since = [], now
        return broken

    def write(self, record: dict[str, float | int]) -> None:
        """One line of metrics.jsonl, and the same for the trackers; one that fails does not end the run."""
        if not self.accelerator.is_main_process:
            return
        self.file.append(record)
        if self.accelerator.trackers:
            values = {key: value for key, value in record.items() if key != "step"}
            try:
                self.accelerator.log(values, step=int(record["step"]))
            except Exception as error:  # a full disk, a server that is gone: each tracker raises its own kind
                log.warning("tracking stopped, training goes on: %s", error)
                self.accelerator.trackers = []

    def pause(self) -> None:
        """Leave out of images/s what was not training."""
        self.since = time.perf_counter()


def validation_loss(
    data: TrainingData, objective: Objective, models: Models, unet, text_encoder, cfg: Any, accelerator
) -> float:
    """Mean loss of up to `validation_images` pictures, at fixed timesteps with fixed noise.

    Each process takes its share of the pictures; the result is the same on all of them. Pictures are spread
    evenly over the table, so that the first folder does not stand for all.
    """
    count = min(cfg.validation_images, len(data.table.rows))
    rows = [i * len(data.table.rows) // count for i in range(count)]
    models = replace(
        models, student=as_function(unet), embed=lambda prompts: data.embed(prompts, text_encoder)
    )
    total = torch.zeros(())
    with evaluating(*(model for model in (unet, text_encoder) if model is not None)), accelerator.autocast():
        for row in rows[accelerator.process_index :: accelerator.num_processes]:
            batch = data.fixed_batch(row, cfg.validation_timesteps)
            total += objective.validation(models, batch, batch.text_states(text_encoder)).cpu()
    return float(accelerator.reduce(total.to(accelerator.device), "sum")) / count


Embeds: TypeAlias = tuple[Tensor, Tensor]
"""States of a prompt and of the negative one, (1, L, D) each."""
Embed: TypeAlias = Callable[[], list[Embeds]]


class SampleSheet:
    """Samples of fixed prompts and seeds over the run: a row each, a column per step, one without LoRA.

    Where the teacher has LoRAs, it is the teacher that has the first column.

    Args:
        sampler: what the LoRA's file will ask for, if not the base's usual one; then a second column without
            LoRA is drawn with it, or one could not tell what is due to the LoRA.
        draw: sample_images, or what makes pictures as it does.
        options: of sample_images, for the base's usual sampler.
    """

    def __init__(
        self,
        folder: Path,
        base: Base,
        text_encoder,
        prompts: Sequence[str],
        embed: Embed,
        prompt_syntax: str,
        sampler: Mapping[str, Any] | None = None,
        draw: Callable[..., list[Image.Image]] = sample_images,
        **options,
    ):
        self.folder, self.base, self.text_encoder = folder, base, text_encoder
        self.prompts, self.embed, self.syntax = prompts, embed, prompt_syntax
        self.sampler, self.sample_images, self.options = sampler, draw, options

    def draw(self, step: int) -> None:
        """Sample at `step` and draw the sheet anew. A failure is a warning: it must not end the run."""
        try:
            self._forget_others()
            base = only_adapters(self.base.unet, self._teachers())
            with lora_disabled(self.text_encoder), base, words_at_start(self.base.words):
                if not self._files(WITHOUT):
                    self._sample(WITHOUT, None)
                if self.sampler and not self._files(FEW_STEPS):
                    self._sample(FEW_STEPS, self.sampler)
            self._sample(f"{step:08d}", self.sampler)
            self._draw_sheet()
        except Exception as error:
            kind = type(error).__name__
            log.warning("samples at step %d failed, training goes on: %s: %s", step, kind, error)
        finally:
            self.base.drop("vae")

    def _teachers(self) -> list[str]:
        """Names of the teacher's adapters: what is learnt is compared with the teacher, if it has any."""
        return [name for name in getattr(self.base.unet, "peft_config", {}) if name.startswith(TEACHER)]

    def _forget_others(self) -> None:
        """Remove the pictures of other prompts, seeds or sampler settings, which a sheet would mislabel."""
        syntax = {} if self.syntax == "plain" else {"prompt_syntax": self.syntax}
        sampler = {"sampler": self.sampler} if self.sampler else {}
        text = json.dumps({"prompts": self.prompts, **syntax, **self.options, **sampler}, indent=1)
        record = self.folder / "settings.json"
        if not record.exists() or record.read_text(encoding="utf-8") != text:
            for path in self.folder.glob("????????-*.png"):
                path.unlink()
            publish_file(record, text.encode())

    def _files(self, column: str) -> list[Path]:
        return sorted(self.folder.glob(f"{column}-*.png"))

    def _sample(self, column: str, sampler: Mapping[str, Any] | None) -> None:
        options = self.options
        if sampler:
            options = options | {
                "scheduler": make_scheduler(self.base, sampler["scheduler"]),
                "steps": sampler["num_inference_steps"],
                "guidance_scale": sampler["guidance_scale"],
            }
        models = [self.base.unet] if self.text_encoder is None else [self.base.unet, self.text_encoder]
        with evaluating(*models):
            rows = (self.sample_images(self.base, *embeds, **options) for embeds in self.embed())
            images = [image for row in rows for image in row]
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            save_png(image, self.folder / f"{column}-{number:02d}.png")

    def _draw_sheet(self) -> None:
        drawn = {path.name[:8] for path in self.folder.glob("????????-*.png")}
        later = sorted(drawn - {WITHOUT, FEW_STEPS})
        if len(later) > MAX_COLUMNS:  # evenly spaced, the last among them
            later = [later[(i + 1) * len(later) // MAX_COLUMNS - 1] for i in range(MAX_COLUMNS)]
        labels = {WITHOUT: "teacher" if self._teachers() else "without LoRA"}
        if self.sampler:
            labels[FEW_STEPS] = f"the same, {self.sampler['scheduler']} {self.sampler['num_inference_steps']}"
        labels |= {column: f"step {int(column)}" for column in later}
        columns = [[load_image(path) for path in self._files(column)] for column in labels]
        seeds = self.options["seeds"]
        rows = [f"{prompt} · seed {seed}" for prompt in self.prompts for seed in seeds]
        sheet = contact_sheet(
            [list(row) for row in zip(*columns, strict=True)],
            row_labels=rows,
            column_labels=list(labels.values()),
        )
        save_png(sheet, self.folder / "sheet.png")
