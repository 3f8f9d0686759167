"""The main job in three minutes on two CPU cores: fit a LoRA to each of two photographs, and morph them.

    python demo.py          (or `make demo`, which installs what it needs first)

Runs train_lora.py on cfg/mountain.json and cfg/mountain_up.json, samples the base from two seeds without and
with each LoRA, and runs morph.py on cfg/morph/mountain.json. Writes ckpt/mountain.safetensors,
ckpt/mountain_up.safetensors, out/morph/mountain/ with morph.gif, and out/demo/ with sheet.png and index.html,
which shows everything and needs nothing but the pages beside it.
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
FILM = Path("out/morph/mountain")
COLUMNS = ["input", "VAE round trip"]
COLUMNS += [f"{how} LoRA, seed {seed}" for how in ("without", "with") for seed in SEEDS]
NEXT = {
    "Pictures of your own words:": 'python generate.py prompt="a watercolor of snowy mountains at dawn"',
    "A LoRA at three weights:": (
        "python generate.py loras.0.path=ckpt/mountain.safetensors grid.weight='[0,0.5,1]' name=weights"
    ),
    "A LoRA of your own pictures, each with a .txt of its caption beside it:": (
        "python train_lora.py cfg/mountain.json data_dir=MY_PICTURES ckpt_name=mine"
    ),
    "A style, and photographs redrawn in it:": (
        "python train_lora.py cfg/style.json && python style_transfer.py"
    ),
}


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
    from lorakit.diffusion.lora import load_lora, lora_disabled
    from lorakit.diffusion.models import Base, set_up_backend
    from lorakit.diffusion.paths import decode_picture, encode_picture
    from lorakit.pictures.folder import read_folder
    from lorakit.pictures.images import crop, load_image, psnr, resize_to_cover
    from lorakit.sampling.samplers import sample_images
    from lorakit.weights.base import inspect_base

    cfg = json.loads(config.read_text(encoding="utf-8"))
    set_up_backend("cpu")
    base = Base(inspect_base(cfg["pretrained_model_name_or_path"]))
    row = read_folder(Path(cfg["data_dir"])).rows[0]
    side = cfg["resolution"]
    picture = crop(resize_to_cover(load_image(row.source), side, side), side, side)
    round_trip = decode_picture(base, encode_picture(base, picture)[0])
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


def look(rows: Sequence[tuple[list, list[str]]], times: dict[str, float]) -> Path:
    """The page with all of it, and beside it those of the trainings and of the morph; returns its path."""
    from lorakit.film.demo_page import Row, demo_page
    from lorakit.ground.publish import publish_file
    from lorakit.pictures.folder import read_folder
    from lorakit.pictures.images import load_image
    from lorakit.pictures.page import webp

    configs = [json.loads(config.read_text(encoding="utf-8")) for config in CONFIGS]
    names = [cfg["ckpt_name"] for cfg in configs]
    captions = [read_folder(Path(cfg["data_dir"])).rows[0].caption for cfg in configs]
    pages = {f"{name}.html": (Path("ckpt") / name, f"how the LoRA of {name} was trained") for name in names}
    pages["morph.html"] = (FILM, "the film frame by frame, with its speed and its sharpness")
    for name, (folder, _) in pages.items():
        publish_file(OUTPUT.with_name(name), (folder / "index.html").read_bytes())
    made = {name: what for name, (_, what) in pages.items()}
    made |= {f"ckpt/{name}.safetensors": "a LoRA for diffusers, ComfyUI and A1111" for name in names}
    made |= {str(FILM / "morph.gif"): "the film", str(OUTPUT): "what each LoRA does, as one picture"}
    page = demo_page(
        [
            Row(name, caption, pictures, list(map(": ".join, zip(COLUMNS, told, strict=True))))
            for name, caption, (pictures, told) in zip(names, captions, rows, strict=True)
        ],
        [webp(load_image(path)) for path in sorted((FILM / "frames").glob("*.png"))],
        made=made,
        times=times,
        commands=NEXT,
    )
    publish_file(OUTPUT.with_name("index.html"), page.encode())
    return OUTPUT.with_name("index.html")


def main() -> None:
    from lorakit.pictures.images import save_png
    from lorakit.pictures.sheet import contact_sheet

    times = {f"training {config.stem}": each for config, each in zip(CONFIGS, fit(CONFIGS), strict=True)}
    start = time.perf_counter()
    rows = [show(config) for config in CONFIGS]
    sheet = contact_sheet(
        [pictures for pictures, _ in rows],
        captions=[told for _, told in rows],
        row_labels=[config.stem for config in CONFIGS],
        column_labels=COLUMNS,
        title="One LoRA per photograph; PSNR to the photograph under each picture",
    )
    save_png(sheet, OUTPUT)
    times["sampling"] = time.perf_counter() - start
    print(f"wrote       ckpt/mountain.safetensors, ckpt/mountain_up.safetensors, {OUTPUT}", flush=True)
    times["the morph"] = film()
    for what, seconds in times.items():
        print(f"took        {seconds:.0f} s for {what}")
    print(f"wrote       {look(rows, times)}: everything on one page; open it in a browser")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
