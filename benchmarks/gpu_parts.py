"""The parts of benchmarks/gpu.py, each run in a process of its own; what they find goes to a JSON file.

A result with figures has `ms` of what `of` names (a step, frame or picture), `images_per_second`, `peak_mb`
of the device (of the process, on a CPU), `precision`, and `flops_per_image` where operations were counted.
"""

import argparse
import contextlib
import io
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, SIZES, Part, Setup, Size, slug

CAPTION = "a photo of rocky mountains number {}"


class Skip(Exception):
    """A part cannot be measured here; the message says why."""


def run_one(name: str, part: Part, setup: Setup) -> int:
    """Run a part in this process and write what it finds."""
    try:
        result = globals()[part.work](setup, SIZES[setup.size], **part.options)
    except Skip as skip:
        result = {"state": "skipped", "why": str(skip)}
    path = Path(setup.folder) / f"{slug(name)}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return 0


def figures(of: str, images: int, seconds: float, dtype: str, flops: float | None = None) -> dict[str, Any]:
    """Of something that takes `seconds` and makes, or learns from, `images`."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    found = {"ms": round(seconds * 1e3, 3), "of": of, "images_per_second": round(images / seconds, 4)}
    return found | {
        "peak_mb": round(peak / 1e6),
        "precision": dtype.replace("no", "float32"),
        "flops_per_image": flops,
    }


# ---- what all parts start from ----


def base_of(setup: Setup) -> str:
    return str(Path(setup.folder) / f"base_{setup.size}")


def pictures_of(setup: Setup) -> Path:
    return Path(setup.folder) / f"pictures_{setup.size}"


def lora_of(setup: Setup) -> Path:
    return Path(setup.folder) / "runs" / "build.safetensors"


def flops_of(setup: Setup) -> dict[str, float]:
    """Operations of the U-Net for one picture: `forward`, and `step` with backward to the LoRA."""
    return json.loads((Path(setup.folder) / "build.json").read_text(encoding="utf-8"))["flops"]


def build(setup: Setup, size: Size) -> dict[str, Any]:
    """The base, the pictures, and one training step, which fills the caches and leaves a LoRA."""
    import torch
    from diffusers import __version__ as diffusers_version

    from benchmarks.sd15_shape import build_sd15

    base, staging = Path(base_of(setup)), Path(f"{base_of(setup)}.tmp")
    if not base.exists():
        shutil.rmtree(staging, ignore_errors=True)
        build_sd15(staging, size.divisor, size.side, setup.device)
        staging.rename(base)
    draw_pictures(pictures_of(setup), 8, 2 * size.side)
    train(setup, size, "build", max_train_steps=1)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "diffusers": diffusers_version, "flops": count_flops(base)}


def draw_pictures(folder: Path, count: int, side: int) -> None:
    """Photographs' worth of noise as JPEG, each with its own caption."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    random, lines = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        small = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        if not path.exists():
            small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
        lines.append(json.dumps({"file_name": path.name, "text": CAPTION.format(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def count_flops(base: Path) -> dict[str, float]:
    """On tensors without content; attention counts as the matrix products that it is."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lorakit.diffusion.lora import add_lora

    config: Any = UNet2DConditionModel.load_config(base, subfolder="unet")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    add_lora(unet, rank=8, alpha=8)
    with torch.device("meta"):
        side = config["sample_size"]
        inputs = torch.empty(1, config["in_channels"], side, side), torch.tensor([500])
        states = torch.empty(1, 77, config["cross_attention_dim"])
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward:
                loss = unet(*inputs, states).sample.mean()
            with FlopCounterMode(display=False) as backward:
                loss.backward()
    counted = forward.get_total_flops(), backward.get_total_flops()
    return {"forward": counted[0], "step": sum(counted)}


def train_config(setup: Setup, size: Size, name: str, **changes: Any) -> Any:
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig

    keys = {
        "pretrained_model_name_or_path": base_of(setup),
        "data_dir": str(pictures_of(setup)),
        "resolution": size.side,
        "aspect_ratio_buckets": False,
        "mixed_precision": precision(),
        "max_train_steps": size.steps,
        "logging_steps": max(1, size.steps // 6),
        "checkpointing_steps": 1_000_000,
        "validation_steps": 0,
        "sample_steps": 0,
        "report_to": None,
        "output_dir": f"{setup.folder}/runs",
        "ckpt_name": slug(name),
        "overwrite": True,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in (keys | changes).items()]
    return load_config(TrainConfig, None, words).config


def train(setup: Setup, size: Size, name: str, **changes: Any) -> list[dict[str, float]]:
    """train_lora.py, without its lock; what it wrote of its steps."""
    from lorakit.ground.runs import claim_run
    from lorakit.training.plan import make_plan
    from train_lora import train

    cfg = train_config(setup, size, name, **changes)
    run = Path(cfg.output_dir) / cfg.ckpt_name
    claim_run(run, resume=False, overwrite=True)
    train(cfg, make_plan(cfg), run)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def precision() -> str:
    """What `auto` stands for where a LoRA is trained: bf16, fp16 or no."""
    from lorakit.training.setup import resolve_precision

    return resolve_precision("auto")


def sampling_precision() -> str:
    """What it stands for where pictures are made."""
    import torch

    from lorakit.diffusion.models import resolve_precision

    return resolve_precision("auto", "cuda" if torch.cuda.is_available() else "cpu")


# ---- parts ----


def tests(setup: Setup, size: Size) -> dict[str, Any]:
    """`pytest -m gpu`; without a GPU all of them are skipped, and that is said."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/scripts/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    lost = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode or not counts:
        raise SystemExit("; ".join(lost) or f"pytest ended with {done.returncode}")
    return counts


def step(setup: Setup, size: Size, batch: int, **changes: Any) -> dict[str, Any]:
    """A step of train_lora.train, by its own clock, once the first sixth has warmed up."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        options = {"train_batch_size": batch} | changes
        records = train(setup, size, "_".join(["step", *map(str, options.values())]), **options)
    print(said.getvalue())
    if refused := re.search(r"torch SDPA is used: (.*)", said.getvalue()):
        raise Skip(refused[1])
    block = max(1, size.steps // 6)
    rate = statistics.median(record["images_per_second"] for record in records[block::block])
    return figures(
        "step", batch, batch / rate, changes.get("mixed_precision", precision()), flops_of(setup)["step"]
    )


def bare(setup: Setup, size: Size, batch: int) -> dict[str, Any]:
    from benchmarks.train import time_bare

    args = argparse.Namespace(base=base_of(setup), steps=size.steps, precision=precision())
    seconds = statistics.median(time_bare(args, batch)[1:])
    return figures("step", batch, seconds, precision(), flops_of(setup)["step"])


def peer(setup: Setup, size: Size, batch: int) -> dict[str, Any]:
    """diffusers' example on the same base and pictures."""
    from benchmarks.train import peer_steps

    assert setup.peer is not None
    options = {
        "pretrained_model_name_or_path": base_of(setup),
        "train_data_dir": pictures_of(setup),
        "resolution": size.side,
        "train_batch_size": batch,
        "max_train_steps": size.steps,
        "mixed_precision": precision(),
        "rank": 8,
        "learning_rate": 1e-4,
        "checkpointing_steps": 1_000_000,
        "dataloader_num_workers": 4,
        "seed": 0,
        "output_dir": Path(setup.folder) / "runs" / f"peer_{batch}",
    }
    seconds = statistics.median(peer_steps(setup.peer, options)[size.steps // 6 :])
    return figures("step", batch, seconds, precision(), flops_of(setup)["step"])


def morph(setup: Setup, size: Size) -> dict[str, Any]:
    """morph.py from one picture to another, with a LoRA: inversion, probe, frames and decoding."""
    import morph

    shutil.rmtree(Path(setup.folder) / "morph", ignore_errors=True)
    images = [
        {
            "path": str(pictures_of(setup) / f"{k:04d}.jpg"),
            "prompt": CAPTION.format(k),
            "lora": str(lora_of(setup)),
        }
        for k in range(2)
    ]
    keys = {
        "pretrained_model_name_or_path": base_of(setup),
        "images": images,
        "frames": size.frames,
        "num_inference_steps": size.inference_steps,
        "probe_steps": min(13, size.inference_steps),
        "formats": [],
        "output_dir": f"{setup.folder}/morph",
        "name": "film",
    }
    report = run_script(setup, morph.main, keys, "morph/film/report.json")
    seconds = report["seconds"] / size.frames
    flops = flops_of(setup)["forward"] * report["unet_evaluations"] / size.frames
    return figures("frame", 1, seconds, sampling_precision(), flops)


def generate(setup: Setup, size: Size) -> dict[str, Any]:
    """generate.py, two batches of four; the second counts. Guidance takes two evaluations a step."""
    import generate

    steps = max(2, size.inference_steps // 2)
    keys = {
        "pretrained_model_name_or_path": base_of(setup),
        "loras": [{"path": str(lora_of(setup))}],
        "prompt": CAPTION.format(0),
        "images_per_prompt": 8,
        "batch_size": 4,
        "num_inference_steps": steps,
        "output_dir": f"{setup.folder}/generate",
        "overwrite": True,
    }
    report = run_script(setup, generate.main, keys, "generate/samples/report.json")
    seconds = report["pictures"][-1]["seconds"]
    return figures("picture", 1, seconds, sampling_precision(), 2 * steps * flops_of(setup)["forward"])


def caching(setup: Setup, size: Size) -> dict[str, Any]:
    """Latents and text states of pictures that were never seen, as training makes them; loading apart."""
    from accelerate import Accelerator

    from lorakit.diffusion.models import Base, compute_dtype, set_up_backend
    from lorakit.training.plan import make_plan
    from lorakit.training.preparation import prepare

    folder, cache = Path(setup.folder) / f"many_{setup.size}", Path(setup.folder) / "cold"
    draw_pictures(folder, size.pictures, 2 * size.side)
    shutil.rmtree(cache, ignore_errors=True)
    changes = {"data_dir": str(folder), "cache_dir": str(cache), "dataloader_num_workers": 4}
    cfg = train_config(setup, size, "caching", **changes)
    plan, accelerator = make_plan(cfg), Accelerator(mixed_precision=precision())
    set_up_backend(accelerator.device.type)
    base = Base(plan.base, accelerator.device, compute_dtype(cfg.mixed_precision))
    assert base.vae and base.text_encoder
    begun = time.perf_counter()
    prepare(cfg, plan, base, accelerator, Path(cfg.output_dir) / "caching")
    seconds = (time.perf_counter() - begun) / size.pictures
    return figures("picture", 1, seconds, precision())


def run_script(setup: Setup, main: Any, keys: dict[str, Any], report: str) -> dict[str, Any]:
    """The report of a script of ours, run with these settings and the defaults."""
    folder = Path(setup.folder)
    (folder / "empty.json").write_text("{}", encoding="utf-8")
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    if code := main([str(folder / "empty.json"), *words]):
        raise SystemExit(f"it ended with {code}")
    return json.loads((folder / report).read_text(encoding="utf-8"))
