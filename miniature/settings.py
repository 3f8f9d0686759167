"""Keys that every training of the miniature has. No torch here, so that help and faults answer at once."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from lorakit.ground.command import parse_command
from lorakit.ground.config import Config

ROOT = Path(__file__).resolve().parents[1]


class RunConfig(Config):
    """The run folder, the optimizer and the length of a training."""

    headings: ClassVar[dict[str, str]] = {"output_dir": "Run"}

    output_dir: str = Field("out/miniature", description="where run folders, rendered pictures and caches go")
    ckpt_name: str = Field("run", pattern=r"^[^/\\\x00]+$", description="name of the run folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a CUDA GPU where there is one")
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        "auto",
        description="dtype of the forward pass; weights are float32 always; auto: bf16 where the device has "
        "units for it",
    )
    render_workers: int | None = Field(
        None, ge=1, le=256, description="processes that render pictures; null: one per core"
    )
    batch_size: int = Field(16, ge=1, description="pictures per step")
    learning_rate: float = Field(
        1e-3, gt=0, description="of AdamW at its peak; a cosine takes it to a hundredth"
    )
    matrix_scale: float = Field(
        10.0, gt=0, description="learning rate of the matrices, which Muon moves, over that of the rest"
    )
    warmup_steps: int = Field(200, ge=0, description="steps over which it rises from 0")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient's norm is clipped to this")
    ema_power: float = Field(
        8.0,
        ge=0,
        description="the average of the weights is what counts: those after step t weigh t ** ema_power",
    )
    max_train_steps: int = Field(1000, ge=1, description="steps of the whole run")
    checkpointing_steps: int = Field(
        1000, ge=1, description="steps between checkpoints; one more at the end, or where a signal stops it"
    )
    validation_steps: int = Field(
        1000, ge=1, description="steps between figures on pictures that are never trained on"
    )
    logging_steps: int = Field(100, ge=1, description="steps between lines of the log")
    seed: int = Field(0, ge=0, lt=2**63, description="every random number of the run follows from it")
    resume_from_checkpoint: bool | str = Field(
        False, description='true or "latest", or the path of a checkpoint folder'
    )
    overwrite: bool = Field(False, description="replace an earlier run of the same name")

    @model_validator(mode="after")
    def _one_of_two(self):
        if self.resume_from_checkpoint and self.overwrite:
            raise ValueError("resume_from_checkpoint, overwrite: continue the run or replace it, not both")
        return self


# What may differ when a run is resumed; the rest would make another run of it.
FREE = {
    "batch_size",
    "checkpointing_steps",
    "ckpt_name",
    "device",
    "learning_rate",
    "logging_steps",
    "max_train_steps",
    "output_dir",
    "overwrite",
    "render_workers",
    "resume_from_checkpoint",
    "validation_steps",
}


C = TypeVar("C", bound=RunConfig)


def run_script(
    config: type[C], train: Callable[[C, str], Path], argv: list[str], script: str, description: str
) -> int:
    """A stage's command line; `train` gets its config and the command that goes on if a signal stops it."""
    default = ROOT / f"miniature/cfg/{script.removeprefix('train_')}.json"
    command = parse_command(
        config, argv, prog=f"{script}.py", description=description, default_config=str(default)
    )
    if "check" in command.flags:
        return 0
    kept = [a for a in argv if not a.startswith(("resume_from_checkpoint=", "overwrite="))]
    again = shlex.join(["python", f"miniature/{script}.py", *kept, "resume_from_checkpoint=latest"])
    print(f"wrote       {train(command.config, again)}")
    return 0
