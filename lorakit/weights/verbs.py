"""The verbs of mix_lora.py: their keys, the files they take, and how a command line is read. No torch here."""

import difflib
import math
import os
import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from lorakit.ground.command import Command, parse_command
from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.weights.base_settings import BaseConfig

Files = list[tuple[str, float | None]]
"""Path and weight in the order of the command line; None where no weight is given."""


# fmt: off
class Table(Config):
    modules: bool = Field(True, description="a line per module too")


class Output(Config):
    out: str = Field(description="LoRA file to write", pattern=r"\.safetensors$")
    overwrite: bool = Field(False, description="replace it if it exists")
    format: Literal["kohya", "diffusers", "animatediff"] = Field("kohya", description="kohya is read by diffusers, ComfyUI and A1111; diffusers is PEFT's, which alone diffusers reads of LoRAs for motion; animatediff has AnimateDiff's own names, for these alone")
    dtype: Literal["float32", "fp16", "bf16"] | None = Field(None, description="of the tensors; null: as in the files, the wider one where they differ")


class Truncated(Output):
    rank: int | None = Field(None, ge=1, description="rank of each module at most")
    energy: float | None = Field(None, gt=0, le=1, description="share of the squared singular values to keep in each module")


class Convert(Truncated):
    fold_alpha: bool = Field(False, description="write alpha = rank, the scale in the matrices, for programs that read no alpha; format=diffusers always does")


class Mix(Truncated):
    method: Literal["exact", "svd", "ties", "dare", "linear"] = Field("exact", description="exact: concatenate, ranks add up; svd: the exact sum at a lower rank; ties, dare: rules on sparse deltas, at a lower rank; linear: add the factors, for comparison")
    density: float = Field(0.5, gt=0, le=1, description="share of entries that ties and dare keep")
    seed: int = Field(0, ge=0, lt=2**63, description="of dare")

    @model_validator(mode="after")
    def _rank_has_a_use(self) -> "Mix":
        if self.method in ("exact", "linear") and (self.rank or self.energy):
            raise ValueError(f"rank and energy do not go with method {self.method}; choose method svd")
        return self


class Resize(Truncated):
    @model_validator(mode="after")
    def _has_a_size(self) -> "Resize":
        if self.rank is None and self.energy is None:
            raise ValueError("give rank, energy or both")
        return self


class Extract(Resize):
    targets: Literal["attention", "attention+ff", "all"] = Field("all", description="modules: attention projections; with feed-forward and projections; with convolutions")
    biases: bool = Field(False, description="biases and norms too, as .diff_b, .w_norm and .b_norm; not in format=diffusers")
    base_config: BaseConfig = None


class Folder(Config):
    out: str = Field(description="base to write: a folder, or a .safetensors file where BASE is one")
    overwrite: bool = Field(False, description="replace it if it is a base")
    base_config: BaseConfig = None


class Retrain(Config):
    out: str | None = Field(None, description="config file to write; null: print it", pattern=r"\.json$")
    overwrite: bool = Field(False, description="replace it if it exists")


class Verb(NamedTuple):
    """`count`: fewest and most files; `about`: what it does."""

    config: type[Config]
    usage: str
    count: tuple[int, float]
    about: str


VERBS = {
    "inspect": Verb(Table, "FILE ...", (1, math.inf), "layout, base, rank, alpha and norm per module, training config, what it touches"),
    "mix": Verb(Mix, "FILE[=WEIGHT] ...", (1, math.inf), "weighted sum of LoRAs; a negative weight subtracts"),
    "scale": Verb(Output, "FILE=WEIGHT", (1, 1), "one LoRA times a weight"),
    "resize": Verb(Resize, "FILE", (1, 1), "a lower rank, by SVD"),
    "convert": Verb(Convert, "FILE", (1, 1), "another layout, without loss; numbered modules are named; LoHa, LoKr and whole weights become LoRA"),
    "merge": Verb(Folder, "BASE FILE[=WEIGHT] ...", (2, math.inf), "a base with LoRAs in its weights: a folder, a checkpoint or a cached hub id; weight -1 takes one out again"),
    "extract": Verb(Extract, "BASE TUNED", (2, 2), "the difference of two bases as a LoRA"),
    "diff": Verb(Table, "FILE FILE", (2, 2), "two LoRAs: config, norms, and cosine per module"),
    "retrain": Verb(Retrain, "FILE", (1, 1), "the training config out of a LoRA's metadata"),
}
# fmt: on


def overview() -> str:
    """The help of mix_lora.py without a verb."""
    lines = [f"  {name:8} {verb.usage:24} {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        ["usage: mix_lora.py VERB FILE ... [key=value ...] [--help]", "", "verbs:", *lines, ""]
        + ["`mix_lora.py VERB --help` lists a verb's keys."]
    )


def parse_verb(name: str, argv: Sequence[str]) -> tuple[Command, Files]:
    """The config and the files of a verb.

    Raises:
        UserError: no such verb, a weight that is no number, or too few or too many files.
        ConfigError, SystemExit: as parse_command.
    """
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        raise UserError(
            f"{name}: no such verb; " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(VERBS)}")
        )
    verb = VERBS[name]
    named = [text for text in argv if is_file(text, verb.config.model_fields)]
    command = parse_command(
        verb.config,
        [text for text in argv if text not in named],
        prog=f"mix_lora.py {name} {verb.usage}",
        description=verb.about,
    )
    files = [parse_file(text) for text in named]
    if not verb.count[0] <= len(files) <= verb.count[1]:
        raise UserError(f"{name} takes {verb.usage}, not {len(files)} files")
    return command, files


def is_file(text: str, keys: Collection[str]) -> bool:
    """Whether an argument names a LoRA or a base, and is no setting, no option and no config."""
    name, equals, _ = text.partition("=")
    if name in keys and equals or text.startswith("-"):
        return False
    is_setting = equals and re.fullmatch(r"[A-Za-z_]\w*", name) and not os.path.exists(name)
    return not text.endswith(".json") and (os.path.exists(text) or not is_setting)


def parse_file(text: str) -> tuple[str, float | None]:
    """`a.safetensors=0.7` -> path and weight; what exists under its whole name is a path."""
    path, equals, number = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{text}: the weight after = is no number")
    return path, weight
