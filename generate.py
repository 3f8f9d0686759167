"""Pictures from prompts, with any LoRAs: to use a LoRA, to choose its weight, its rank or its checkpoint.

    python generate.py                                           # four prompts on the embedded base
    python generate.py prompt="a photo of snowy mountains at noon with a lake" images_per_prompt=4
    python generate.py loras.0.path=ckpt/mountain.safetensors grid.weight=[0,0.5,1] prompt="…"
    python generate.py --from out/samples/0003.png num_inference_steps=50      # that picture again, but for …

Reads a base, LoRA files and prompts. Writes to <output_dir>/<name>/: numbered PNGs that carry their config,
sheet.png, report.json.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.process import run_guarded
from lorakit.sampling.config import check_size
from lorakit.sampling.gallery import Gallery, fill_folder
from lorakit.sampling.generate_plan import (
    GenerateConfig,
    count_pictures,
    picture_shape,
    read_prompts,
    texts_of,
)
from lorakit.sampling.recipe import parse_sampling
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.tokens import unread_notes

if TYPE_CHECKING:
    from PIL.Image import Image


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


def main(argv: list[str]) -> int:
    command = parse_sampling(
        GenerateConfig,
        argv,
        prog="generate.py",
        description="Make pictures from prompts with Stable Diffusion and any LoRAs.",
        default_config="cfg/generate/landscapes.json",
    )
    cfg = command.config
    info = inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_size(cfg, info)
    prompts = read_prompts(cfg)
    notes = [*info.notes, *(note for _, cell in cfg.numbered_cells() for note in cell.resolved()[1])]
    if "check" in command.flags:  # a run says it where it comes to them
        notes += unread_notes(info, texts_of(cfg))
    width, height = picture_shape(cfg, info)
    count = count_pictures(cfg, prompts)
    return fill_folder(
        command,
        lambda folder: generate(cfg, info, prompts, folder),
        what=f"{count} at {width}x{height} with {info.name}",
        notes=notes,
        files=f"{count} pictures, report.json",
    )


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
