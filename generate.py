"""Pictures from prompts, with any LoRAs: to use a LoRA, to choose its weight, its rank or its checkpoint.

    python generate.py                                           # four prompts on the embedded base
    python generate.py prompt="a photo of snowy mountains at noon with a lake" images_per_prompt=4
    python generate.py loras.0.path=ckpt/mountain.safetensors grid.weight=[0,0.5,1] prompt="…"
    python generate.py --from out/samples/0003.png num_inference_steps=50      # that picture again, but for …

Reads a base, LoRA files and prompts. Writes to <output_dir>/<name>/: numbered PNGs that carry their config,
sheet.png, report.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from lorakit.ground.config import parse_command
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.sampling.config import SamplingConfig, check_size, repeated
from lorakit.sampling.gallery import Gallery, claim_folder
from lorakit.weights.base import BaseInfo, inspect_base

if TYPE_CHECKING:
    from PIL.Image import Image


# fmt: off
class GenerateConfig(SamplingConfig):
    """The keys of a config of generate.py."""

    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"prompt": "Pictures"}

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field("", description="what to show; a list makes a row of the sheet for each")
    prompt_file: str | None = Field(None, description="text file with a prompt in each line, which counts instead of prompt")
    images_per_prompt: int = Field(1, ge=1, le=10_000, description="pictures of each prompt")

    axes: ClassVar[tuple[str, ...]] = (*SamplingConfig.axes, "prompt")

    @model_validator(mode="after")
    def _agree(self):
        if "prompt" in self.grid and self.prompt_file is not None:
            raise ValueError("grid, prompt_file: prompts come from the one or from the other")
        for value in self.grid.get("prompt", ()):
            if not isinstance(value, str):
                raise ValueError(f"grid: prompt cannot be {json.dumps(value)}: each value is one text")
        return self
# fmt: on


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


def generate(cfg: GenerateConfig, info: BaseInfo, prompts: list[str], folder: Path) -> list[Path]:
    """Make the pictures; returns the paths of the sheets."""
    from lorakit.diffusion.models import open_base
    from lorakit.sampling.grid import Batch, fill
    from lorakit.sampling.samplers import sample_images

    started = time.perf_counter()
    base = open_base(info, cfg.mixed_precision, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    check_size(cfg, base.info)  # again, for a base that was not on this machine
    shape = picture_shape(cfg, base.info)
    varies = "prompt" in cfg.grid

    def prompts_of(cell: GenerateConfig) -> list[str]:
        return read_prompts(cell) if varies else prompts

    def render(batch: Batch) -> list["Image"]:
        _, steps, guidance_scale = batch.cfg.sampler()
        return sample_images(
            base,
            batch.prompt_embeds,
            batch.negative_embeds,
            seeds=batch.seeds,
            shape=shape,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=batch.scheduler,
        )

    def alone(cell: GenerateConfig, subject: int, seed: int) -> GenerateConfig:
        own = {"prompt": prompts_of(cell)[subject], "prompt_file": None, "seed": seed, "images_per_prompt": 1}
        return cell.model_copy(update=own)

    gallery = Gallery(folder, cfg, ["prompt"] if varies else prompts)
    fill(gallery, base, cfg, cfg.images_per_prompt, prompts=prompts_of, render=render, alone=alone)
    report = {"seconds": round(time.perf_counter() - started, 2), "device": str(base.device)}
    return gallery.finish(report)


def picture_shape(cfg: GenerateConfig, info: BaseInfo) -> tuple[int, int]:
    """Width and height in pixels."""
    return cfg.width or info.resolution, cfg.height or info.resolution


def count_pictures(cfg: GenerateConfig, prompts: list[str]) -> int:
    subjects = 1 if "prompt" in cfg.grid else len(prompts)
    return sum(map(len, cfg.cells())) * subjects * cfg.images_per_prompt


def main(argv: list[str]) -> int:
    argv, again = repeated(GenerateConfig, argv)
    command = parse_command(
        GenerateConfig,
        argv,
        prog="generate.py",
        description="Make pictures from prompts with Stable Diffusion and any LoRAs.",
        default_config=None if again else "cfg/generate/landscapes.json",
        epilog="`--from PICTURE.png` takes the settings of a picture that this script made; settings after it "
        "change them.",
    )
    cfg = command.config
    info = inspect_base(cfg.pretrained_model_name_or_path)
    check_size(cfg, info)
    prompts = read_prompts(cfg)
    notes = [note for _, cell in cfg.numbered_cells() for note in cell.resolved()[1]]
    width, height = picture_shape(cfg, info)
    print(f"pictures    {count_pictures(cfg, prompts)} at {width}x{height} with {info.name}", flush=True)
    print("".join(f"note        {note}\n" for note in dict.fromkeys(notes)), end="", flush=True)
    if "check" in command.flags:
        return 0
    folder = claim_folder(cfg)
    sheets = generate(cfg, info, prompts, folder)
    print(f"wrote       {folder}: {count_pictures(cfg, prompts)} pictures, report.json; look at {sheets[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
