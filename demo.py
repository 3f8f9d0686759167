"""The main job in three minutes on two CPU cores: fit a LoRA to each of two photographs, and morph them.

    python demo.py          (or `make demo`, which installs what it needs first)

Runs train_lora.py on cfg/mountain.json and cfg/mountain_up.json, samples the base from two seeds without and
with each LoRA, and runs morph.py on cfg/morph/mountain.json. Writes ckpt/mountain.safetensors,
ckpt/mountain_up.safetensors, out/demo/sheet.png, and out/morph/mountain/ with morph.gif and index.html.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded

CONFIGS = (Path("cfg/mountain.json"), Path("cfg/mountain_up.json"))
MORPH = Path("cfg/morph/mountain.json")
OUTPUT = Path("out/demo/sheet.png")
SEEDS = (0, 1)
GUIDANCE_SCALE = 1.5


def fit(configs: Sequence[Path]) -> list[float]:
    """Train the LoRAs side by side, as a user would; return the seconds that each took, imports and all.

    On so small a model a second thread gains little, so each process gets its share of the cores instead.
    """
    threads = max(1, (os.cpu_count() or 1) // len(configs))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}

    def run(config: Path) -> float:
        start = time.perf_counter()
        command = [sys.executable, "train_lora.py", str(config), "overwrite=true"]
        with open(OUTPUT.with_name(f"{config.stem}.log"), "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            for line in process.stdout or ():
                if line.strip():
                    print(f"{config.stem:12s}{line.rstrip()}")
            if process.wait():
                raise UserError(f"training {config} failed; {log.name} says why")
        return time.perf_counter() - start

    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(run, configs))


def show(config: Path) -> tuple[list, list[str]]:
    """One row of the sheet: picture, VAE round trip, each seed without and with LoRA; and its captions."""
    import torch

    from lorakit.diffusion.lora import load_lora, lora_disabled
    from lorakit.diffusion.models import Base, set_up_backend
    from lorakit.pictures.folder import read_folder
    from lorakit.pictures.images import crop, load_image, psnr, resize_to_cover, to_array
    from lorakit.sampling.samplers import sample_images
    from lorakit.weights.base import inspect_base

    cfg = json.loads(config.read_text(encoding="utf-8"))
    set_up_backend("cpu")
    base = Base(inspect_base(cfg["pretrained_model_name_or_path"]))
    row = read_folder(Path(cfg["data_dir"])).rows[0]
    side = cfg["resolution"]
    picture = crop(resize_to_cover(load_image(row.source), side, side), side, side)
    round_trip = base.decode_pictures(base.mean_latents(torch.from_numpy(to_array(picture))[None]))[0]
    states = base.text_encoder(base.tokenize([row.caption, ""]))[0]
    load_lora(Path(cfg["output_dir"]) / f"{cfg['ckpt_name']}.safetensors", base.unet, adapter_name="fitted")
    options = {"seeds": SEEDS, "shape": (side, side), "steps": 25, "guidance_scale": GUIDANCE_SCALE}
    with lora_disabled(base.unet):
        without = sample_images(base, states[:1], states[1:], **options)
    fitted = sample_images(base, states[:1], states[1:], **options)
    images = [picture, round_trip, *without, *fitted]
    return images, ["the picture"] + [f"{psnr(image, picture):.1f} dB" for image in images[1:]]


def film() -> float:
    """Morph one photograph into the other with both LoRAs, as a user would; return the seconds it took."""
    start = time.perf_counter()
    if subprocess.run([sys.executable, "morph.py", str(MORPH), "overwrite=true"]).returncode:
        raise UserError(f"the morph of {MORPH} failed; the lines above say why")
    return time.perf_counter() - start


def main() -> None:
    from lorakit.pictures.images import save_png
    from lorakit.pictures.sheet import contact_sheet

    seconds = fit(CONFIGS)
    start = time.perf_counter()
    rows, captions = zip(*(show(config) for config in CONFIGS), strict=True)
    sheet = contact_sheet(
        rows,
        captions=captions,
        row_labels=[config.stem for config in CONFIGS],
        column_labels=["input", "VAE round trip"]
        + [f"without LoRA, seed {s}" for s in SEEDS]
        + [f"with LoRA, seed {s}" for s in SEEDS],
        title="One LoRA per photograph; PSNR to the photograph under each picture",
    )
    save_png(sheet, OUTPUT)
    for config, each in zip(CONFIGS, seconds, strict=True):
        print(f"trained     {config} in {each:.0f} s")
    print(f"sampled     12 pictures in {time.perf_counter() - start:.0f} s")
    print(f"wrote       ckpt/mountain.safetensors, ckpt/mountain_up.safetensors, {OUTPUT}", flush=True)
    print(f"morphed     in {film():.0f} s, imports and all")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
