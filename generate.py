"""Pictures from prompts, with any LoRAs: to use a LoRA, to choose its weight, its rank or its checkpoint.

    python generate.py                                           # four prompts on the embedded base
    python generate.py prompt="a photo of snowy mountains at noon with a lake" images_per_prompt=4
    python generate.py loras.0.path=ckpt/mountain.safetensors grid.weight=[0,0.5,1] prompt="…"
    python generate.py --from out/samples/0003.png num_inference_steps=50      # that picture again, but for …

Reads a base, LoRA files and prompts. Writes to <output_dir>/<name>/: numbered PNGs that carry their config,
sheet.png, report.json, and index.html to look at.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.process import run_guarded
from lorakit.sampling.config import check_size
from lorakit.sampling.forecast import describe_sampling
from lorakit.sampling.gallery import Gallery, fill_folder
from lorakit.sampling.generate_plan import GenerateConfig, all_asked, asked, picture_shape, read_lines
from lorakit.sampling.prompt_file import Line
from lorakit.sampling.prompts import prompt_notes
from lorakit.sampling.recipe import parse_sampling
from lorakit.weights.base import BaseInfo, inspect_base

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(cfg: GenerateConfig, info: BaseInfo, lines: list[Line], folder: Path) -> list[Path]:
    """Make the pictures; returns the paths of the sheets."""
    from lorakit.diffusion.models import open_base
    from lorakit.sampling.grid import Batch, fill
    from lorakit.sampling.page import write_page
    from lorakit.sampling.samplers import sample_images

    started = time.perf_counter()
    base = open_base(info, cfg.mixed_precision, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    for each in all_asked(cfg, lines):
        check_size(each, base.info)  # again, for a base that was not on this machine

    def render(batch: Batch) -> list["Image"]:
        _, steps, guidance_scale = batch.cfg.sampler()
        return sample_images(
            base,
            batch.prompt_embeds,
            batch.negative_embeds,
            seeds=batch.seeds,
            shape=picture_shape(batch.cfg, base.info),
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=batch.scheduler,
        )

    def alone(cell: GenerateConfig, _: int, seed: int) -> GenerateConfig:
        return cell.model_copy(update={"seed": seed, "images_per_prompt": 1})

    labels = ["prompt"] if "prompt" in cfg.grid else [line.prompt for line in lines]
    gallery = Gallery(folder, cfg, labels)
    fill(
        gallery,
        base,
        cfg,
        cfg.images_per_prompt,
        asked=lambda cell: asked(cell, lines),
        render=render,
        alone=alone,
        facts=lambda _, subject, __: lines[subject].facts(),
    )
    report = {"seconds": round(time.perf_counter() - started, 2), "device": str(base.device)}
    sheets = gallery.finish(report)
    write_page(gallery, report)
    return sheets


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
    lines = read_lines(cfg, info)
    configs = all_asked(cfg, lines)
    for each in configs:
        check_size(each, info)
    notes = [*info.notes, *(note for each in configs for note in each.resolved()[1])]
    if "check" in command.flags:  # a run says it where it comes to them
        notes += prompt_notes(configs, info)
    count = len(configs) * cfg.images_per_prompt
    shapes = dict.fromkeys("{}x{}".format(*picture_shape(each, info)) for each in configs)
    return fill_folder(
        command,
        lambda folder: generate(cfg, info, lines, folder),
        what=f"{count} at {', '.join(shapes)} with {info.name}",
        notes=notes,
        forecast=lambda: describe_sampling(
            configs, info, [picture_shape(each, info) for each in configs], cfg.images_per_prompt
        ),
        files=f"{count} pictures, report.json",
    )


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
