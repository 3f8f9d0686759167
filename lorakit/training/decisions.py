"""Small decisions of the training loop: what is due, when all stop, what is told of a run that diverged."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.ground.checkpoints import checkpoints
from lorakit.training.data import TrainingData
from lorakit.training.order import split_step
from lorakit.training.plan import Plan
from lorakit.training.setup import Learner
from lorakit.training.watch import Broken

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Due:
    """The steps, counted from 1, after which something happens; the last step has all three."""

    checkpoint: frozenset[int]
    validation: frozenset[int]
    sample: frozenset[int]

    @property
    def any(self) -> frozenset[int]:
        return self.checkpoint | self.validation | self.sample


def due_steps(cfg: Any, steps: int) -> Due:
    def every(interval: int | None, times: int) -> frozenset[int]:
        if interval == 0:
            return frozenset()
        interval = interval or max(1, steps // times)
        return frozenset({*range(interval, steps + 1, interval), steps})

    return Due(every(cfg.checkpointing_steps, 1), every(cfg.validation_steps, 10), every(cfg.sample_steps, 4))


def gradient_sync(accelerator, learner: Learner, last: bool) -> contextlib.AbstractContextManager:
    """Gradients are exchanged between processes in the last micro-batch of a step only."""
    stack = contextlib.ExitStack()
    for model in (learner.student, learner.text_student):
        if model is not None and not last:
            stack.enter_context(accelerator.no_sync(model))
    return stack


def place(accelerator) -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    return accelerator.num_processes, accelerator.process_index


def any_process(accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def mean_over_processes(accelerator, parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Parts of a loss as numbers, the same on every process. It waits for the device."""
    if not parts:
        return {}
    values = accelerator.reduce(torch.stack([value.float() for value in parts.values()]), "mean").tolist()
    return dict(zip(parts, values, strict=True))


def trackers(cfg: Any) -> list[Any]:
    """The names in `report_to`; Any, since a list of str does not fit what accelerate takes."""
    return [cfg.report_to] if isinstance(cfg.report_to, str) else list(cfg.report_to or ())


def end_tracking(accelerator) -> None:
    """Close the trackers; one that cannot be closed must not turn a finished run into a failed one."""
    try:
        accelerator.end_training()
    except Exception as error:  # each tracker raises its own kind
        log.warning("a tracker could not be closed: %s", error)


def start_trackers(cfg: Any, accelerator) -> None:
    """Start TensorBoard or what `report_to` names; one that cannot start is a warning."""
    config = {
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in cfg.model_dump().items()
    }
    try:
        accelerator.init_trackers(cfg.ckpt_name, config=config)
    except Exception as error:  # a read-only folder, no network, no login: each tracker raises its own kind
        log.warning("report_to %s cannot start, training goes on without: %s", cfg.report_to, error)
        accelerator.trackers = []
        return
    missing = set(trackers(cfg)) - {tracker.name for tracker in accelerator.trackers}
    if missing and accelerator.is_main_process:
        log.warning("report_to: pip install %s; training goes on without", " ".join(sorted(missing)))


def diverged(cfg: Any, plan: Plan, run: Path, data: TrainingData, order, broken: Broken, rate: float) -> str:
    """What is known of the step whose loss or gradient was not finite, at learning rate `rate`."""
    step = broken.step
    samples = "; ".join(
        data.describe(share.rows, share.positions(step - 1, plan.total_batch))
        for share in split_step(order[step - 1], plan.shapes, plan.total_batch)
    )
    kept = checkpoints(run)
    return (
        f"step {step}: {broken.what} is not finite, at learning rate {rate:.3g}. "
        f"Its samples: {samples}. Nothing of it was saved; "
        + (f"the last checkpoint is {kept[-1][1]}. " if kept else "there is no checkpoint yet. ")
        + "Lower learning_rate, or look at these pictures"
        + ("; or take bf16 instead of fp16" if cfg.mixed_precision == "fp16" else "")
    )
