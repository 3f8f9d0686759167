"""Films from prompts under a camera that moves, with a motion adapter or without one, and any LoRAs.

    python animate.py                                            # a pan over mountains, on the embedded base
    python animate.py camera.pan=0 camera.zoom=1.4 prompt="a photo of snowy mountains at noon with a lake"
    python animate.py camera.zoom=[1,1.3,1] loop=true loras.0.path=ckpt/ink.safetensors
    python animate.py cfg/animate/picture.json                   # into a photograph, which the film starts on
    python animate.py cfg/sd15/animate.json motion_adapter=ADAPTER       # AnimateDiff on Stable Diffusion 1.5

The noise of the frames lies in a scene and is seen through the camera (after Chang et al. 2024), and while
they are denoised they agree about that scene; `lorakit/motion/` has both. A motion adapter (AnimateDiff, Guo
et al. 2024, https://arxiv.org/abs/2307.04725) looks along the frames besides. Reads a base, an adapter and
LoRA files. Writes to <output_dir>/<name>/: frames/*.png, film.gif and other animations, sheet.png,
report.json, index.html.
A command that was interrupted goes on when it is given again, to the same bytes.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.film.morph_folder import claim, frame_paths, open_frame
from lorakit.ground.command import print_notes
from lorakit.ground.errors import StoppedError
from lorakit.ground.process import StopFlag, run_guarded
from lorakit.ground.publish import check_writable, make_folder, remove
from lorakit.ground.runs import lock_run
from lorakit.motion.animate_plan import AnimatePlan, describe_animation, fingerprint, make_animate_plan
from lorakit.motion.config import AnimateConfig
from lorakit.pictures.animation import FORMATS
from lorakit.sampling.fitting import fit_lora, picture_fit
from lorakit.sampling.recipe import parse_sampling, png_text

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.diffusion.models import Base

OWN_FILES = (
    "frames",
    "state",
    "report.json",
    "index.html",
    "sheet.png",
    *(f"film.{kind}" for kind in FORMATS),
)


def animate(plan: AnimatePlan, folder: Path, stop: StopFlag, hint: str) -> None:
    """Make the film.

    Raises:
        StoppedError: a signal came; what is done stays, and the same command goes on from there.
    """
    from tqdm import tqdm

    from lorakit.diffusion.metrics import EncoderDistance
    from lorakit.motion.animate_report import summary, write_outputs
    from lorakit.motion.filming import inflate, open_studio, put_in_picture, scene_noise
    from lorakit.sampling.samplers import LoraStack, open_planned

    # -- base, adapter, LoRAs
    started, was_known = time.perf_counter(), plan.base.known
    base, plan = open_planned(plan.cfg, plan, make_animate_plan)
    if not was_known:  # with the config's own schedule
        base.info = plan.base
    cfg = plan.cfg
    key = fingerprint(plan, str(base.dtype))
    claim(cfg, folder, key, "animation", OWN_FILES)
    paths = frame_paths(folder / "frames", cfg.frames)
    evaluations = 0
    if not all(path.exists() for path in paths):
        if plan.adapter:
            inflate(base, plan.adapter)
        stack = LoraStack(base)
        stack.use(cfg.all_loras())
        print_notes(stack.new_notes())

        # -- the frames' noise, and what they agree on while it leaves them
        studio = open_studio(plan, base)
        if cfg.image:
            put_in_picture(plan, studio)
        rows = (1 + (cfg.sampler()[2] != 1)) * (sum(map(len, plan.wide)) if plan.wide else cfg.frames)
        with tqdm(total=rows * cfg.sampler()[1], desc=cfg.name, unit="row") as bar:

            def step(evaluated: int) -> None:
                bar.update(evaluated)
                if signum := stop.poll():
                    raise StoppedError(f"what is done is kept. To go on: {hint}", signum)

            noise = scene_noise(plan, base, studio.shown)
            kept = folder / "state/film.safetensors", key
            latents = studio.denoise(noise, cfg.sampler()[1], step, kept)

        evaluations = studio.evaluations
        develop(base, cfg, latents, paths)
        remove(folder / "state")

    # -- what is looked at
    report = {
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(base.device),
        "unet_evaluations": evaluations,
    }
    frames = [open_frame(path) for path in paths]
    print("\n".join(summary(write_outputs(plan, folder, frames, EncoderDistance(base), report))))


def fit_missing(cfg: AnimateConfig, plan: AnimatePlan, folder: Path, stop: StopFlag) -> None:
    """Train the LoRA of the picture that the film starts from, if it is not there yet."""
    for lora in plan.missing:
        assert cfg.image
        fit = picture_fit(cfg, lora, cfg.image, cfg.prompts()[0], plan.shape, folder)
        fit_lora(fit, stop, Path(__file__).with_name("train_lora.py"))


def develop(base: "Base", cfg: AnimateConfig, latents: "Tensor", paths: Sequence[Path]) -> None:
    """Decode frames one by one; those that are there already are kept as they are."""
    from lorakit.pictures.images import save_png

    make_folder(paths[0].parent)
    for latent, path in zip(latents, paths, strict=True):
        if not path.exists():
            image = base.decode_pictures(latent[None])[0]
            save_png(image, path, text=png_text(cfg, cfg.prompts()[0], cfg.seed, image.size))


def main(argv: Sequence[str]) -> int:
    command = parse_sampling(
        AnimateConfig,
        argv,
        prog="animate.py",
        description="Make a film from a prompt under a moving camera, with Stable Diffusion and any LoRAs.",
        default_config="cfg/animate/film.json",
    )
    cfg = command.config
    plan = make_animate_plan(cfg)
    width, height = plan.shape
    print(f"film        {cfg.frames} frames at {width}x{height} with {plan.base.name}", flush=True)
    if "check" in command.flags:
        print("\n".join(describe_animation(plan)))
    print_notes(plan.notes)
    if "check" in command.flags:
        return 0
    folder = Path(cfg.output_dir) / cfg.name
    check_writable(folder.parent, 2 * cfg.frames * width * height * 3)
    hint = shlex.join(["python", "animate.py", *(word for word in argv if not word.startswith("overwrite="))])
    with lock_run(folder), StopFlag() as stop:
        fit_missing(cfg, plan, folder, stop)
        animate(plan, folder, stop, hint)
    print(f"wrote       {folder}: {cfg.frames} frames, sheet.png, report.json; look at {folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
