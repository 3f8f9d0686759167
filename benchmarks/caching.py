"""What caching many pictures costs, against another checkout of this toolkit.

    python benchmarks/caching.py --pictures 2000                         # a try
    python benchmarks/caching.py --pictures 10000 --against ../before    # the table of docs/SPEED.md

Each round runs train_lora.py for one step in processes of their own, by turns with the other checkout's: on
one picture, on 100, and on all of them with an empty cache (cold) and with a full one (warm). Then it times,
here, what a step reads from the disk and from memory. Prints a table and, last, one JSON line: medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BASE = ROOT / "ckpt/miniature"
SIDE = 64


def make_pictures(folder: Path, count: int) -> Path:
    """Pictures of noise with a caption each."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=95)
        text = f"a photo of {number} mountains"
        lines.append(json.dumps({"file_name": f"{number:06d}.jpg", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(data: Path, cache: Path, output: Path) -> list[str]:
    return [
        f"pretrained_model_name_or_path={BASE}",
        f"data_dir={data}",
        f"cache_dir={cache}",
        f"output_dir={output}",
        f"resolution={SIDE}",
        "ckpt_name=run",
        "max_train_steps=1",
        "checkpointing_steps=1000000",
        "sample_steps=0",
        "validation_steps=0",
        "report_to=null",
        "overwrite=true",
        "mixed_precision=no",
    ]


class Start(NamedTuple):
    """What a train_lora.py of one step took; `cpu` are seconds of processors, whatever else ran there."""

    seconds: float
    cpu: float
    peak_mb: float


def timed_run(checkout: Path, *where: Path) -> Start:
    command = [sys.executable, "train_lora.py", str(checkout / "cfg/mountain.json"), *settings(*where)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        pid = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=log).pid
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode())
    return Start(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def one_round(checkout: Path, folder: Path, pictures: dict[int, Path]) -> dict[str, float]:
    """One start of each kind, those of one picture and of 100 with full caches too."""
    count, cache, output = max(pictures), folder / "cache", folder / "output"
    if not (folder / "few").exists():
        timed_run(checkout, pictures[100], folder / "few", output)  # that of one picture is among them
    one, hundred = (timed_run(checkout, pictures[few], folder / "few", output) for few in (1, 100))
    shutil.rmtree(cache, ignore_errors=True)
    cold, warm = (timed_run(checkout, pictures[count], cache, output) for _ in range(2))
    return {
        "caching_s": cold.seconds - warm.seconds,
        "caching_cpu_s": cold.cpu - warm.cpu,
        "warm_s": warm.seconds - one.seconds,
        "warm_cpu_s": warm.cpu - one.cpu,
        "one_picture_s": one.seconds,
        "one_picture_cpu_s": one.cpu,
        "above_100_mb": max(cold.peak_mb, warm.peak_mb) - hundred.peak_mb,
        "files": sum(path.is_file() for path in cache.rglob("*")),
        "cache_mb": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6,
    }


def time_reading(data: Path, cache: Path, output: Path) -> dict[str, float]:
    """Microseconds in which a step has its batch of one picture, and milliseconds of the step."""
    import torch

    from benchmarks.train import time_bare
    from lorakit.diffusion.models import Base
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from lorakit.training.plan import make_plan
    from lorakit.training.preparation import prepare
    from lorakit.training.setup import start_processes

    cfg = load_config(TrainConfig, None, settings(data, cache, output)).config
    plan = make_plan(cfg)
    accelerator = start_processes(cfg, plan, [])
    batches, _, _ = prepare(cfg, plan, Base(plan.base), accelerator, output)
    assert batches.text_states is not None
    rows, caches = range(min(1000, len(plan.table.rows))), (batches.latents, batches.text_states)
    seconds = {"disk": [], "memory": []}
    for _ in range(5):
        for where, budget in (("disk", 0), ("memory", 1 << 40)):
            for each in caches:
                each.held, each.budget = {}, budget
            for held in (False, True):
                begin = time.perf_counter()
                for row in rows:
                    batches.batch([row], [row])
                if held:
                    seconds[where].append((time.perf_counter() - begin) / len(rows))
    disk, memory = (statistics.median(seconds[where]) for where in ("disk", "memory"))
    step = statistics.median(time_bare(argparse.Namespace(base=str(BASE), precision="no", steps=60)))
    return {
        "disk_us": disk * 1e6,
        "memory_us": memory * 1e6,
        "step_ms": step * 1e3,
        "disk_over_memory": (step + disk) / (step + memory),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, with its base in ckpt/miniature")
    args = parser.parse_args()
    checkouts = {"here": ROOT} | ({"against": args.against.absolute()} if args.against else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = {n: make_pictures(folder / f"{n}", n) for n in (1, 100, args.pictures)}
        rounds = {way: [] for way in checkouts}
        for _ in range(args.rounds):
            for way, checkout in checkouts.items():
                rounds[way].append(one_round(checkout, folder / way, pictures))
        whole = pictures[args.pictures], folder / "here/cache", folder / "output"
        report(args, rounds, time_reading(*whole))


def report(args: argparse.Namespace, rounds: dict[str, list], reading: dict[str, float]) -> None:
    summary: dict[str, Any] = {"benchmark": "caching", "pictures": args.pictures, "side": SIDE}
    print(f"{args.pictures} pictures of {SIDE} pixels, medians of {args.rounds} rounds")
    for name in rounds["here"][0]:
        summary[name] = {
            way: round(statistics.median(each[name] for each in own), 2) for way, own in rounds.items()
        }
        if args.against:
            pairs = zip(rounds["here"], rounds["against"], strict=True)
            summary[name]["ratio"] = round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
        print(f"  {name:14s} " + "  ".join(f"{way} {value:10.2f}" for way, value in summary[name].items()))
    summary["reading"] = {name: round(value, 3) for name, value in reading.items()}
    print("  a step's batch  " + "  ".join(f"{name} {value}" for name, value in summary["reading"].items()))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
