"""How soon a LoRA holds its photograph: seconds of the training and likeness of the samples, ways by turns.

    python benchmarks/fitting.py                                        # the table of docs/TRAINING.md
    python benchmarks/fitting.py --way shipped --way rank4 rank=4 --seeds 0 --folder out/rank4

A way is a name and settings of train_lora.py for cfg/mountain.json and cfg/mountain_up.json; each is trained
in a process of its own, and what it takes is told less a training of one step: on the clock, and of the
processor, where other work does not count. Four samples of the caption (DDIM 25, the demo's guidance) are
compared with the photograph: PSNR, and sharpness over that of the VAE's round trip, since blur may win PSNR.
`inversion` is the PSNR, to that round trip, of what 25 steps of DDIM there and back leave. What is done is
kept in the folder, the photograph, its round trip and the samples of each training as a strip. Prints a
table and, last, one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from demo import CONFIGS, GUIDANCE_SCALE  # noqa: E402
from lorakit.diffusion.denoiser import Denoiser, Rows  # noqa: E402
from lorakit.diffusion.inversion import invert, sample  # noqa: E402
from lorakit.diffusion.metrics import sharpness  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.diffusion.paths import decode_picture, encode_picture  # noqa: E402
from lorakit.pictures.folder import read_folder  # noqa: E402
from lorakit.pictures.images import crop, load_image, psnr, resize_to_cover, save_png  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.sampling.samplers import sample_images  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from lorakit.weights.lora_import import read_any  # noqa: E402

WAYS = {
    "before": [
        *("learning_rate=2e-3", "lr_scheduler_name=constant", "timestep_bias=0"),
        *("adam_beta1=0.9", "adam_beta2=0.999", "n_epochs=200"),
    ],
    "shipped": [],
    "shipped, 200 steps": ["n_epochs=200"],
}
NOISES, STEPS = 4, 25


def timed_training(config: Path, path: Path, seed: int, settings: list[str]) -> dict[str, float]:
    """Train the LoRA `path`; what its process took."""
    own = [f"output_dir={path.parent}", f"ckpt_name={path.stem}", f"seed={seed}", "overwrite=true"]
    quiet = ["report_to=null", "sample_steps=0", "validation_steps=0"]
    command = [sys.executable, "train_lora.py", str(config), *settings, *own, *quiet]
    begin = time.perf_counter()
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log:
        pid = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log).pid
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{path.with_suffix('.log')} says why this training failed")
    lines = (path.parent / path.stem / "metrics.jsonl").read_text().splitlines()
    return {
        "steps": max(json.loads(line)["step"] for line in lines),
        "seconds": time.perf_counter() - begin,
        "cpu": usage.ru_utime + usage.ru_stime,
    }


@cache
def photograph(config: Path) -> tuple[Image.Image, str]:
    """As the training sees it, and its caption."""
    cfg = json.loads(config.read_text())
    row, side = read_folder(Path(cfg["data_dir"])).rows[0], cfg["resolution"]
    return crop(resize_to_cover(load_image(row.source), side, side), side, side), row.caption


@torch.no_grad()
def look(config: Path, path: Path) -> tuple[dict[str, Any], list[Image.Image]]:
    """What the LoRA is worth, and the photograph, its round trip and the samples."""
    picture, caption = photograph(config)
    merged = (str(path), read_any(path)[0].modules, 1.0)
    base = Base(inspect_base("ckpt/miniature"), merged=(merged,))
    latent = encode_picture(base, picture)
    round_trip = decode_picture(base, latent[0])
    states = base.text_encoder(base.tokenize([caption, ""]))[0]
    options: Any = {"seeds": range(NOISES), "shape": picture.size, "steps": STEPS}
    samples = sample_images(base, states[:1], states[1:], guidance_scale=GUIDANCE_SCALE, **options)
    denoiser, rows = Denoiser(base.unet, base.noise_schedule()), Rows.plain(states[:1], states[1:])
    grid = denoiser.schedule.grid(STEPS)
    *_, noise = invert(latent, grid, lambda x, t: denoiser(x, t, rows))
    *_, back = sample(noise, grid, lambda x, t: denoiser(x, t, rows))
    each = [psnr(image, picture) for image in samples]
    row = {
        "psnr": mean(each),
        "each": each,
        "sharpness": mean(map(sharpness, samples)) / sharpness(round_trip),
        "inversion": psnr(decode_picture(base, back[0]), round_trip),
    }
    return row, [picture, round_trip, *samples]


def measured(config: Path, way: str, seed: int, settings: list[str], folder: Path) -> dict[str, Any]:
    """The row of one training, from the folder where it is done."""
    name = f"{config.stem}_{way}_{seed}".replace(" ", "_").replace(",", "").replace(".", "_")
    kept = folder / f"{name}.json"
    if not kept.exists():
        first = folder / f"{config.stem}_start.json"
        if not first.exists():  # twice: the first has the caches to fill
            for _ in range(2):
                start = timed_training(config, first.with_suffix(".safetensors"), 0, ["max_train_steps=1"])
            first.write_text(json.dumps(start))
        path = folder / f"{name}.safetensors"
        start, took = json.loads(first.read_text()), timed_training(config, path, seed, settings)
        row, images = look(config, path)
        save_png(contact_sheet([images]), folder / f"{name}.png")
        took |= {what: took[what] - start[what] for what in ("seconds", "cpu")}
        kept.write_text(json.dumps({"photograph": config.stem, "way": way, "seed": seed} | took | row))
    return json.loads(kept.read_text())


def told(rows: list[dict[str, Any]], ways: list[str]) -> list[dict[str, Any]]:
    """A line for each photograph and way: means over seeds, and what it is to the first way, seed by seed."""
    lines = []
    for config in CONFIGS:
        own = {way: [r for r in rows if (r["photograph"], r["way"]) == (config.stem, way)] for way in ways}
        for way, each in own.items():
            pairs = list(zip(each, own[ways[0]], strict=True))
            line: dict[str, Any] = {"photograph": config.stem, "way": way}
            names = ("steps", "seconds", "cpu", "psnr", "sharpness", "inversion")
            line |= {what: mean(row[what] for row in each) for what in names}
            line["lowest_psnr"] = min(row["psnr"] for row in each)
            line["ratio"] = median(row["seconds"] / first["seconds"] for row, first in pairs)
            line["cpu_ratio"] = median(row["cpu"] / first["cpu"] for row, first in pairs)
            line["psnr_gain"] = [row["psnr"] - first["psnr"] for row, first in pairs]
            lines.append(line)
    return lines


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--way", action="append", nargs="+", help="its name, and key=value for train_lora.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "out/fitting", help="where LoRAs are kept")
    options = parser.parse_args()
    ways = {name: settings for name, *settings in options.way} if options.way else WAYS
    set_up_backend("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in options.seeds:
        for config in CONFIGS:
            for way, settings in ways.items():
                rows.append(measured(config, way, seed, settings, options.folder))
                print("{photograph} {way} {seed}: {psnr:.2f} dB, {cpu:.1f} s".format(**rows[-1]), flush=True)
    lines = told(rows, list(ways))
    print(
        f"\n{'photograph':14s}{'way':22s}steps  seconds (ratio)  cpu (ratio)  PSNR (gain)  sharp  inversion"
    )
    for line in lines:
        gain = mean(line["psnr_gain"])
        print(
            "{photograph:14s}{way:22s}{steps:5.0f}{seconds:9.1f} ({ratio:.2f}){cpu:7.1f} ({cpu_ratio:.2f})"
            "{psnr:7.2f} ({0:+.2f}){sharpness:7.2f}{inversion:11.1f}".format(gain, **line)
        )
    print(json.dumps({"lines": lines, "rows": rows}))


if __name__ == "__main__":
    main()
