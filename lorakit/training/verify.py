"""Proof that a stopped and resumed run equals a straight one, on this machine and with this config."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.ground.checkpoints import verify_checkpoint
from lorakit.ground.errors import DivergedError, StoppedError
from lorakit.training.plan import Plan


def verify_resume(train: Callable, cfg: Any, plan: Plan, steps: int = 3) -> str:
    """Train 2 x `steps` steps at once, and again with a stop in the middle, and compare the files by byte.

    Args:
        train: train_lora.train.

    Raises:
        DivergedError: the two differ: on this machine, with this config, a resumed run is another run.
    """
    plan = replace(plan, steps=2 * steps, samples=None)
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": None, "sample_steps": 0, "validation_steps": steps, "overwrite": False}
        for name, stop_after in (("straight", None), ("resumed", steps)):
            part = cfg.model_copy(update=quiet | {"output_dir": f"{folder}/{name}"})
            run = Path(part.output_dir) / part.ckpt_name
            resume = None
            if stop_after:
                resume = run / f"checkpoint-{stop_after:08d}"
                try:
                    train(part, plan, run, stop_after=stop_after)
                except StoppedError:
                    if not resume.exists():  # a signal of the user's came first
                        raise
            train(part, plan, run, resume)
            files = verify_checkpoint(run / f"checkpoint-{2 * steps:08d}")["files"]
            tensors = [name for name in files if name.endswith(".safetensors")]
            digests.append({name: files[name]["sha256"] for name in tensors})
    straight, resumed = digests
    if straight != resumed:
        differing = [name for name in straight if straight[name] != resumed[name]]
        raise DivergedError(
            f"resume is not exact here: after {2 * steps} steps, stopped at {steps} and not, {differing} "
            "differ; on a GPU set deterministic to true"
        )
    what = "lora.safetensors" if "lora.safetensors" in straight else "words.safetensors"
    return (
        f"resume is exact: {2 * steps} steps in one go and with a stop at {steps} give "
        f"{what} {straight[what][:16]}…"
    )
