"""What generate.py will do: its keys, its prompts, and the config of every picture. No torch here."""

import json
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from lorakit.ground.config import checked
from lorakit.ground.config_text import ConfigError
from lorakit.ground.errors import UserError
from lorakit.sampling.config import SamplingConfig, size_faults
from lorakit.sampling.prompt_file import Line, read_prompt_file
from lorakit.weights.base import BaseInfo


# fmt: off
class GenerateConfig(SamplingConfig):
    """The keys of a config of generate.py."""

    script: ClassVar[str] = "generate.py"
    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"prompt": "Pictures"}

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field("", description="what to show; a list makes a row of the sheet for each")
    prompt_file: str | None = Field(None, description="text file with a prompt in each line, which counts instead of prompt; a line that begins with # is a comment, and one may end with --n NEGATIVE --w WIDTH --h HEIGHT --s STEPS --l GUIDANCE --d SEED, as in sd-scripts")
    images_per_prompt: int = Field(1, ge=1, le=10_000, description="pictures of each prompt")

    axes: ClassVar[tuple[str, ...]] = (*SamplingConfig.axes, "prompt")
# fmt: on

    @model_validator(mode="after")
    def _agree(self):
        if "prompt" in self.grid and self.prompt_file is not None:
            raise ValueError("grid, prompt_file: prompts come from the one or from the other")
        for value in self.grid.get("prompt", ()):
            if not isinstance(value, str):
                raise ValueError(f"grid: prompt cannot be {json.dumps(value)}: each value is one text")
        return self


def read_lines(cfg: GenerateConfig, info: BaseInfo | None = None) -> list[Line]:
    """The prompts, each with what its line of a prompt file sets.

    Args:
        info: of the base that is to make them.

    Raises:
        UserError: as read_prompt_file; lines that set what cannot be, what this base cannot make, or what the
            grid varies.
    """
    if cfg.prompt_file is None:
        return _own_lines(cfg)
    plain = cfg.model_copy(update={"grid": {}})

    def check(line: Line) -> None:
        place, both = _place(cfg, line), sorted(line.settings.keys() & cfg.grid.keys())
        faults = [f"{place}: sets {key}, which the grid varies" for key in both]
        try:
            own = _asked(plain, line)
            faults += [f"{place}: {fault}" for fault in (size_faults(own, info) if info else ())]
        except ConfigError as error:
            faults += str(error).splitlines()
        if faults:
            raise UserError("\n".join(faults))

    return read_prompt_file(cfg.prompt_file, check)


def _own_lines(cfg: GenerateConfig) -> list[Line]:
    prompts = [cfg.prompt] if isinstance(cfg.prompt, str) else cfg.prompt
    return [Line(number, prompt, {}) for number, prompt in enumerate(prompts, 1)]


def asked(cell: GenerateConfig, lines: Sequence[Line]) -> list[GenerateConfig]:
    """The config of each subject in a cell of the grid: one prompt, and what its line sets.

    Args:
        lines: those of the prompt file; without one the cell has its own.

    Raises:
        ConfigError: a line sets what cannot be.
    """
    return [_asked(cell, line) for line in (lines if cell.prompt_file is not None else _own_lines(cell))]


def all_asked(cfg: GenerateConfig, lines: Sequence[Line]) -> list[GenerateConfig]:
    """The config of every subject in every cell of the grid; raises as `asked`."""
    return [each for _, cell in cfg.numbered_cells() for each in asked(cell, lines)]


def _asked(cell: GenerateConfig, line: Line) -> GenerateConfig:
    own = {"prompt": line.prompt, "prompt_file": None}
    if not line.settings:
        return cell.model_copy(update=own)
    return checked(GenerateConfig, cell.model_dump(mode="json") | own | line.settings, _place(cell, line))


def _place(cfg: GenerateConfig, line: Line) -> str:
    return f"{cfg.prompt_file}: line {line.number}"


def picture_shape(cfg: GenerateConfig, info: BaseInfo) -> tuple[int, int]:
    """Width and height in pixels."""
    return cfg.width or info.resolution, cfg.height or info.resolution
