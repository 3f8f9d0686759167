"""What a training step costs, against its limit and against the uncached way.

    python benchmarks/train.py                              # the miniature, on the CPU: about three minutes
    python benchmarks/train.py --shape sd15 --steps 100     # SD 1.5's shape, random weights, no download
    python benchmarks/train.py --peer DIFFUSERS/examples/text_to_image/train_text_to_image_lora.py

Ways take turns, each in a process of its own, over several rounds:
  bare      forward, backward and optimizer of the same U-Net and LoRA on tensors that never change: the limit
  ours      train_lora.train as users run it
  uncached  VAE and text encoder in every step, and a DataLoader worker per epoch, as tutorials do it
  peer      diffusers' own example, from a checkout, on the same base and picture
Prints a table and, last, one JSON line: median seconds per step, peak memory, and ratios round by round.
"""

import argparse
import itertools
import json
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sd15_shape import build_sd15  # noqa: E402

WAYS = ("bare", "ours", "uncached")
PHOTO = ROOT / "dataset" / "mountain" / "mountain.jpg"
CAPTION = "a photo of rocky mountains at noon with a forest"


def settings(args: argparse.Namespace, folder: str) -> list[str]:
    side, cache = (128, folder) if args.shape == "miniature" else (512, Path(args.base).parent)
    return [
        f"pretrained_model_name_or_path={args.base}",
        f"data_dir={ROOT / 'dataset/mountain'}",
        f"output_dir={folder}",
        f"resolution={side}",
        f"n_epochs={args.steps}",
        f"mixed_precision={args.precision}",
        f"logging_steps={block(args)}",
        f"cache_dir={cache}/cache",
        "sample_steps=0",
        "validation_steps=0",
        "report_to=null",
        "checkpointing_steps=1000000",
    ]


def time_ours(args: argparse.Namespace) -> list[float]:
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from lorakit.training.plan import make_plan
    from train_lora import train

    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(TrainConfig, None, settings(args, folder)).config
        run = Path(folder) / "run"
        train(cfg, make_plan(cfg), run)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [1 / r["images_per_second"] for r in records[:: block(args)]]


def set_up(args: argparse.Namespace):
    """Accelerator, base with LoRA, and what both hand-written loops train with."""
    import torch
    from accelerate import Accelerator

    from lorakit.diffusion.lora import add_lora
    from lorakit.diffusion.models import Base, compute_dtype, set_up_backend
    from lorakit.training.setup import resolve_precision
    from lorakit.weights.base import inspect_base

    precision = resolve_precision(args.precision)
    accelerator = Accelerator(mixed_precision=precision)
    set_up_backend(accelerator.device.type)
    base = Base(inspect_base(args.base), accelerator.device, compute_dtype(precision))
    params = add_lora(base.unet, rank=8, alpha=8)
    base.unet.train()
    fused = accelerator.device.type in ("cpu", "cuda")
    unet, optimizer = accelerator.prepare(base.unet, torch.optim.AdamW(params, lr=1e-4, fused=fused))
    return accelerator, base, unet, optimizer, params


def block(args: argparse.Namespace) -> int:
    """Steps per timing; the first block is warm-up and does not count."""
    return max(1, min(10, args.steps // 4))


def timed_blocks(args: argparse.Namespace, accelerator, step) -> list[float]:
    import torch

    seconds = []
    for _ in range(0, args.steps, block(args)):
        begin = time.perf_counter()
        for _ in range(block(args)):
            step()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / block(args))
    return seconds


def time_bare(args: argparse.Namespace, batch: int = 1) -> list[float]:
    import torch

    accelerator, base, unet, optimizer, params = set_up(args)
    side, width = base.unet.config.sample_size, base.unet.config.cross_attention_dim
    latents, noise = torch.randn(2, batch, base.info.latent_channels, side, side, device=base.device)
    embeds = torch.randn(batch, base.info.max_tokens, width, device=base.device)
    timestep = torch.tensor([500], device=base.device)

    def step() -> None:
        loss = torch.nn.functional.mse_loss(unet(latents, timestep, embeds).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed_blocks(args, accelerator, step)


class OnePicture:
    """A data set of one picture, read and transformed each time it is shown."""

    def __init__(self, side: int):
        self.side = side

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        import torch
        from PIL import Image
        from torchvision import transforms

        transform = transforms.Compose(
            [
                transforms.Resize(self.side),
                transforms.RandomCrop(self.side),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        return transform(Image.open(PHOTO).convert("RGB")), torch.zeros((), dtype=torch.long)


def time_uncached(args: argparse.Namespace) -> list[float]:
    import torch
    from torch.utils.data import DataLoader

    accelerator, base, unet, optimizer, params = set_up(args)
    picture = OnePicture(base.unet.config.sample_size * base.info.vae_factor)
    # a DataLoader asks for no more than __len__ and __getitem__; its annotation wants the base class
    loader = DataLoader(cast(Any, picture), batch_size=1, shuffle=True, num_workers=1)
    scheduler = base.scheduler

    def step() -> None:  # one epoch is one step: a worker starts, reads the picture, and ends
        for pixels, _ in loader:
            with torch.no_grad():
                latents = base.vae.encode(pixels.to(base.device)).latent_dist.sample() * base.scaling_factor
                embeds = base.text_encoder(base.tokenize([CAPTION]))[0].float()
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (1,), device=base.device)
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
            loss = torch.nn.functional.mse_loss(prediction.float(), noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return timed_blocks(args, accelerator, step)


def peer_steps(script: str, options: Mapping[str, Any]) -> list[float]:
    """Seconds from one backward pass of diffusers' example to the next; it is run in this process."""
    from accelerate import Accelerator

    backward, marks = Accelerator.backward, []

    def marked(self, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        marks.append(time.perf_counter())

    Accelerator.backward = marked
    sys.argv = [script, *(f"--{key}={value}" for key, value in options.items())]
    runpy.run_path(script, run_name="__main__")
    return [b - a for a, b in itertools.pairwise(marks)]


def time_peer(args: argparse.Namespace) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "pretrained_model_name_or_path": args.base,
            "train_data_dir": PHOTO.parent,
            "resolution": 128 if args.shape == "miniature" else 512,
            "max_train_steps": args.steps + 1,
            "mixed_precision": "no" if args.precision == "auto" else args.precision,
            "rank": 8,
            "checkpointing_steps": 1_000_000,
            "seed": 0,
            "cache_dir": f"{folder}/cache",
            "output_dir": f"{folder}/run",
        }
        return peer_steps(args.peer, options)[block(args) - 1 :]


def run_one(args: argparse.Namespace) -> None:
    """One way in this process: median seconds per step after a first block of warm-up, and peak memory."""
    import torch

    ways = {"bare": time_bare, "ours": time_ours, "uncached": time_uncached, "peer": time_peer}
    seconds = ways[args.one](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": statistics.median(seconds[1:] or seconds), "peak_bytes": peak}))


def one_step_run(args: argparse.Namespace, folder: str) -> float:
    """Seconds of a whole train_lora.py process that does one step and writes its file."""
    command = [sys.executable, str(ROOT / "train_lora.py"), str(ROOT / "cfg/mountain.json")]
    command += [*settings(args, folder), "max_train_steps=1", "overwrite=true"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - begin


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--shape", choices=("miniature", "sd15"), default="miniature")
    parser.add_argument("--steps", type=int, default=60, help="steps per way and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "no", "fp16", "bf16"), default="auto")
    parser.add_argument(
        "--peer", help="train_text_to_image_lora.py of a checkout of diffusers, as one way more"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--base", default=str(ROOT / "ckpt/miniature"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape == "sd15":
            args.base = f"{folder}/sd15"
            build_sd15(Path(args.base))
        first = {"cold caches": one_step_run(args, folder), "warm caches": one_step_run(args, folder)}
        results = {way: [] for way in (*WAYS, *(["peer"] if args.peer else []))}
        for _ in range(args.rounds):
            for way in results:
                command = [sys.executable, __file__, f"--one={way}", f"--shape={args.shape}"]
                command += [f"--peer={args.peer}"] if args.peer else []
                command += [f"--steps={args.steps}", f"--precision={args.precision}", f"--base={args.base}"]
                out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
                results[way].append(json.loads(out.splitlines()[-1]))
    report(args, results, first)


def report(args: argparse.Namespace, results: dict[str, list[dict]], first: dict[str, float]) -> None:
    import torch

    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    summary: dict[str, Any] = {
        "benchmark": "train",
        "shape": args.shape,
        "device": device,
        "torch": torch.__version__,
        "steps": args.steps,
    }
    print(f"{args.shape} on {device}, batch 1, {args.steps} steps, median of {args.rounds} rounds")
    for way in results:
        seconds = statistics.median(r["seconds"] for r in results[way])
        peak = max(r["peak_bytes"] for r in results[way]) / 1e6
        pairs = zip(results[way], results["bare"], strict=True)
        ratio = statistics.median(r["seconds"] / b["seconds"] for r, b in pairs)
        summary[way] = {
            "ms": round(seconds * 1e3, 2),
            "images_per_second": round(1 / seconds, 2),
            "peak_mb": round(peak),
            "ratio_to_bare": round(ratio, 3),
        }
        if args.peer:
            beside = zip(results[way], results["peer"], strict=True)
            ratio_to_peer = statistics.median(r["seconds"] / p["seconds"] for r, p in beside)
            summary[way]["ratio_to_peer"] = round(ratio_to_peer, 3)
        speed = f"{seconds * 1e3:8.1f} ms/step {1 / seconds:7.2f} images/s"
        print(f"  {way:9s} {speed} {peak:7.0f} MB  x{ratio:.2f}")
    summary["one_step_run_s"] = {name: round(seconds, 2) for name, seconds in first.items()}
    print("  a whole run of one step: " + ", ".join(f"{s:.1f} s with {name}" for name, s in first.items()))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
