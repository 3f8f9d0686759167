"""How evenly pictures move with their noise: cfg/smooth.json at several weights, trained equally long.

    python benchmarks/smooth.py                                      # weights 0, 1 and 30 at seed 0
    python benchmarks/smooth.py --seeds 0 1 2 --folder out/smooth    # what is trained is kept there

Six prompts, each from one noise to another by slerp in eleven pictures (DDIM 12, guidance 3). A step is the
root mean square of two neighbours' difference in levels of 255: `istd` is the deviation of the steps, `cv`
that over their mean, `distance` that of the ends; `sharpness` is of 32 samples (DDIM 10). In brackets all are
told of weight 0's. Prints a table, writes paths.png, and prints one JSON line last.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.trainings import train_once  # noqa: E402
from lorakit.diffusion.interpolate import slerp  # noqa: E402
from lorakit.diffusion.lora import load_lora  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.ground.randomness import normal  # noqa: E402
from lorakit.pictures.images import from_array, save_png  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from miniature.diffusion import decode, sample_latents  # noqa: E402
from miniature.gates import parts_of  # noqa: E402
from miniature.judging import Parts, embed, prompts_to_watch, sample_pictures, sharpness  # noqa: E402

PATHS, POINTS, SAMPLES = 6, 11, 32
GOALS = {"istd": 0.75, "cv": 0.90, "distance": 0.80, "sharpness": 0.88}
"""Of weight 0: the first two at most, the last two at least."""


def trained(folder: Path, weight: float, seed: int) -> Path:
    """The LoRA, from `folder` where it is done."""
    name = f"weight_{weight:g}_{seed}".replace(".", "_")
    objective = [f"smooth.weight={weight:g}"] if weight else ["objective=denoise", "smooth=null"]
    return train_once("cfg/smooth.json", folder, name, seed, objective)


@torch.no_grad()
def walk(parts: Parts, prompt: str, number: int) -> Tensor:
    """(POINTS, 3, H, W) in [-1, 1]: one prompt from noise to noise, the same in every row of the table."""
    vae, unet, text_encoder, tokenizer = parts
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    start, end = (normal(shape, number, f"end {name}").expand(POINTS, *shape) for name in "ab")
    noise = slerp(start, end, torch.linspace(0, 1, POINTS))
    states = embed(text_encoder, tokenizer, [prompt, ""])
    embeds, negative = (state.expand(POINTS, *state.shape) for state in states)
    return decode(vae, sample_latents(unet, embeds, negative, noise, 12, 3.0)).clamp(-1, 1)


def levels(pictures: Tensor, others: Tensor) -> Tensor:
    """(B,): root mean square difference in levels of 255."""
    return 127.5 * (pictures - others).square().flatten(1).mean(1).sqrt()


def measure(path: Path | None) -> tuple[dict[str, float], list[Tensor]]:
    """The row of a LoRA, or of the base alone, and its paths."""
    base = Base(inspect_base("ckpt/miniature"))
    if path is not None:
        load_lora(path, base.unet, adapter_name="smooth")
    parts, prompts = parts_of(base), prompts_to_watch()
    paths = [walk(parts, prompt, number) for number, prompt in enumerate(prompts[:PATHS])]
    steps = [levels(each[1:], each[:-1]) for each in paths]
    texts = [prompts[i % len(prompts)] for i in range(SAMPLES)]
    samples = sample_pictures(parts, texts, range(SAMPLES), steps=10, guidance_scale=3.0)
    row = {
        "istd": mean(float(step.std()) for step in steps),
        "cv": mean(float(step.std() / step.mean()) for step in steps),
        "distance": mean(float(levels(each[-1:], each[:1])) for each in paths),
        "length": mean(float(step.sum()) for step in steps),
        "sharpness": sharpness(samples),
    }
    return row, paths


def met(row: dict[str, float], plain: dict[str, float]) -> str:
    missed = [
        name
        for name, goal in GOALS.items()
        if (row[name] / plain[name] > goal if name in ("istd", "cv") else row[name] / plain[name] < goal)
    ]
    return "meets all" if not missed else f"misses {', '.join(missed)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 30.0], help="beside 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "out/smooth", help="where LoRAs are kept")
    options = parser.parse_args()
    set_up_backend("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    base, paths = measure(None)
    found: list[dict[str, Any]] = [{"weight": None, "seed": None} | base]
    strips = [("base", paths)]
    for seed in options.seeds:
        plain: dict[str, float] = {}
        for weight in (0.0, *options.weights):
            row, paths = measure(trained(options.folder, weight, seed))
            plain = plain or row
            of_plain = {name: row[name] / plain[name] for name in GOALS}
            found.append({"weight": weight, "seed": seed} | row | {"of_weight_0": of_plain})
            strips.append((f"weight {weight:g}, seed {seed}", paths))
            told = "".join(f"  {name} {row[name]:.3f} ({of_plain[name]:.2f})" for name in GOALS)
            print(f"weight {weight:4g}, seed {seed}{told}  {met(row, plain) if weight else ''}", flush=True)
    rows = [[from_array(picture.numpy()) for picture in walks[0]] for _, walks in strips]
    save_png(
        contact_sheet(rows, row_labels=[label for label, _ in strips], cell=96), options.folder / "paths.png"
    )
    print(json.dumps({"goals": GOALS, "rows": found}))


if __name__ == "__main__":
    main()
