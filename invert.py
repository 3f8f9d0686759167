"""How well each method finds the noise of a picture: a table of PSNR, SSIM, U-Net evaluations and seconds.

    python invert.py                                             # the mountain, on the embedded base
    python invert.py PICTURE.jpg prompt="a photo of a lake" lora=ckpt/lake.safetensors
    python invert.py cfg/invert/mountain.json num_inference_steps=20 methods='["ddim", "anchored"]'

DDIM inversion (Song et al. 2021, https://arxiv.org/abs/2010.02502, sec. 4.3) and its relatives, which
lorakit/diffusion/inversion.py describes; inversion_pipeline.py is the same for programs. Reads a base, a
picture and a LoRA. Writes to <output_dir>/<name of the picture>/: a PNG for each reconstruction, sheet.png,
report.json.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.diffusion.inversion_plan import InversionPlan, InvertConfig, make_inversion_plan, prompts_of
from lorakit.ground.command import parse_command, print_notes, with_picture
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import check_writable, publish_file
from lorakit.pictures.images import IMAGE_SUFFIXES, read_picture, save_png
from lorakit.weights.base import BaseInfo
from lorakit.weights.tokens import unread_notes

if TYPE_CHECKING:  # help, checks and faults of the command line come without torch
    from PIL.Image import Image

    from inversion_pipeline import InversionPipeline
    from lorakit.diffusion.inversion_report import Row


def invert(cfg: InvertConfig, plan: InversionPlan, folder: Path) -> None:
    """Print the table, and write reconstructions, sheet and report."""
    picture = read_picture(cfg.image, plan.size)  # a broken one is found before torch is imported

    from lorakit.diffusion.inversion_report import HEADER, likeness, make_report, scores, sheet, show

    pipe = load(cfg, plan.base)
    round_trip = pipe.decode_latents_to_pictures(pipe.encode_image(picture, *plan.size))[0]
    bound = likeness(round_trip, picture)
    print(f"{HEADER}\n{'VAE round trip':21}{scores(*bound)}", flush=True)
    save_png(picture, folder / "picture.png")
    save_png(round_trip, folder / "vae.png")
    results = []
    for row, image in measure(cfg, plan, pipe, picture, round_trip):
        print(show(row), flush=True)
        if image is not None:
            save_png(image, folder / f"{row.method}_guidance_{row.guidance_scale:g}.png")
        results.append((row, image))
    save_png(sheet(cfg, results, picture, round_trip), folder / "sheet.png")
    report = make_report(cfg, plan.size, str(pipe.device), bound, [row for row, _ in results])
    publish_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())


def load(cfg: InvertConfig, info: BaseInfo) -> "InversionPipeline":
    """The pipeline in float32, on a GPU where there is one, with the LoRA."""
    import torch

    from inversion_pipeline import InversionPipeline
    from lorakit.diffusion.lora import load_lora
    from lorakit.diffusion.models import Base, set_up_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up_backend(device, allow_tf32=False)
    base = Base(info, device, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    if not info.known:
        print_notes(unread_notes(base.info, prompts_of(cfg)))
    pipe = InversionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if cfg.lora is not None:
        notes: list[str] = []
        options: dict[str, Any] = {"weight": cfg.lora_weight, "notes": notes}
        load_lora(cfg.lora, pipe.unet, pipe.text_encoder, adapter_name="lora", **options)
        print_notes(notes)
    return pipe


def measure(
    cfg: InvertConfig, plan: InversionPlan, pipe: "InversionPipeline", picture: "Image", round_trip: "Image"
) -> Iterator[tuple["Row", "Image | None"]]:
    """Invert and sample by each method; yields its line and the reconstruction, None if it is not finite."""
    from lorakit.diffusion.inversion_report import Row, likeness

    evaluations = 0

    def count(_, inputs: Any) -> None:
        nonlocal evaluations
        evaluations += len(inputs[0])

    def mark() -> tuple[int, float]:
        return evaluations, time.perf_counter()

    options: Any = {"negative_prompt": cfg.negative_prompt, "width": picture.width, "height": picture.height}
    hook = pipe.unet.register_forward_pre_hook(count)  # type: ignore[attr-defined]
    try:
        for scale, method in plan.runs:
            e0, t0 = mark()
            (found,) = pipe.invert(
                picture, cfg.prompt, cfg.num_inference_steps, scale, method=method, **options
            )
            e1, t1 = mark()
            latents = pipe.reconstruct(found)
            e2, t2 = mark()
            image = pipe.decode_latents_to_pictures(latents)[0] if latents.isfinite().all() else None
            row = Row(
                method,
                scale,
                *likeness(image, picture),
                *likeness(image, round_trip),
                *(e1 - e0, e2 - e1),
                *(t1 - t0, t2 - t1),
                *(float(found.noise.mean()), float(found.noise.std())),
            )
            yield row, image
    finally:
        hook.remove()


def main(argv: list[str]) -> int:
    argv = with_picture(argv, IMAGE_SUFFIXES)
    own = any(text.startswith("image=") for text in argv)
    command = parse_command(
        InvertConfig,
        argv,
        prog="invert.py",
        description="Invert a picture by several methods and print how well each leads back to it.",
        # Its prompt is the mountain's; it does not go with another picture.
        default_config=None if own else "cfg/invert/mountain.json",
        epilog="`invert.py PICTURE` stands for `invert.py image=PICTURE`.",
    )
    cfg = command.config
    plan = make_inversion_plan(cfg)
    width, height = plan.size
    count = f"{len(plan.runs)} inversions in {cfg.num_inference_steps} steps"
    print(f"picture     {cfg.image} at {width}x{height}, {count}", flush=True)
    print_notes(plan.notes)
    if "check" in command.flags:
        return 0
    folder = Path(cfg.output_dir) / Path(cfg.image).stem
    check_writable(folder)
    invert(cfg, plan, folder)
    print(f"wrote       {folder}: {len(plan.runs)} reconstructions, sheet.png, report.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
