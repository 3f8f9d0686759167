"""What generate.py will do: its keys, its prompts, and how many pictures of what size come of them. No torch here."""

import json
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from lorakit.ground.errors import UserError
from lorakit.sampling.config import SamplingConfig
from lorakit.weights.base import BaseInfo


# fmt: off
class GenerateConfig(SamplingConfig):
    """The keys of a config of generate.py."""

    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"prompt": "Pictures"}

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field("", description="what to show; a list makes a row of the sheet for each")
    prompt_file: str | None = Field(None, description="text file with a prompt in each line, which counts instead of prompt")
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


def read_prompts(cfg: GenerateConfig) -> list[str]:
    """Raises UserError: a prompt file that cannot be read or is empty."""
    if cfg.prompt_file is None:
        return [cfg.prompt] if isinstance(cfg.prompt, str) else list(cfg.prompt)
    try:
        lines = Path(cfg.prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{cfg.prompt_file}: {reason}; prompt_file names a text file") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{cfg.prompt_file}: has no prompt in it")
    return prompts


def picture_shape(cfg: GenerateConfig, info: BaseInfo) -> tuple[int, int]:
    """Width and height in pixels."""
    return cfg.width or info.resolution, cfg.height or info.resolution


def count_pictures(cfg: GenerateConfig, prompts: list[str]) -> int:
    subjects = 1 if "prompt" in cfg.grid else len(prompts)
    return sum(map(len, cfg.cells())) * subjects * cfg.images_per_prompt
