"""What a million pictures cost in memory and time on the way from the table to a batch, with tiny tensors.

    python benchmarks/scale.py --rows 20000             # a try
    python benchmarks/scale.py                          # the table of docs/SCALE.md: ten minutes

Nothing is decoded and no model runs: rows are made up, latents have 32 numbers and text states 16. All else
is what a run does: entries go to shards and are looked for anew, the order of the whole run is walked, and
batches of four are read from the disk in ten windows spread over it. Prints a table and, last, one JSON line.
"""

import argparse
import gc
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorakit.ground.shards import Shards  # noqa: E402
from lorakit.pictures.folder import Row, Table  # noqa: E402
from lorakit.pictures.views import assign_shapes, views_of  # noqa: E402
from lorakit.training.caches import Cache, NumberedNames, TextNames, missing_views  # noqa: E402
from lorakit.training.data import Augmentation, TrainingData  # noqa: E402
from lorakit.training.order import SampleOrder  # noqa: E402
from lorakit.weights.tensors import serialize  # noqa: E402

BATCH, EPOCHS, WINDOWS, STEPS = 4, 2, 10, 500
SIZES = [(512, 512), (768, 512), (512, 768), (1024, 512), (640, 512)]


def memory() -> float:
    """Bytes of this process that no file holds: what was read of files is the system's to drop."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Stages:
    """Seconds of each stage, by the wall and of a processor, and the memory it left behind for each row."""

    def __init__(self, rows: int):
        self.rows, self.found = rows, {}
        self.begin, self.cpu, self.before = time.perf_counter(), time.process_time(), memory()

    def done(self, name: str) -> None:
        seconds, each = time.perf_counter() - self.begin, (memory() - self.before) / self.rows
        cpu = time.process_time() - self.cpu
        found = {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "bytes_a_row": round(each, 1)}
        self.found[name] = found
        print(f"{name:24s} {seconds:8.1f} s {cpu:8.1f} s of a processor {each:8.0f} bytes a row", flush=True)
        self.begin, self.cpu, self.before = time.perf_counter(), time.process_time(), memory()


def made_up(number: int) -> Row:
    width, height = SIZES[number % len(SIZES)]
    name = f"{number // 1000:04d}/{number:07d}.jpg"
    caption = f"a photo of mountains number {number}, at dawn, with a lake and some trees beside it"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return Row(f"dataset/{name}", name, caption, width, height, sha256, f"metadata.jsonl:{number + 1}")


def walk(order: SampleOrder, data: TrainingData) -> dict[str, list[float]]:
    """Milliseconds a step in each window, memory after it, and microseconds a step of the order alone."""
    found: dict[str, list[float]] = {"step_ms": [], "order_us": [], "mb": []}
    gap = max(STEPS, len(order) // WINDOWS)
    for first in range(0, gap * WINDOWS, gap):
        times = []
        for step in range(first, min(first + STEPS, len(order))):
            begin = time.perf_counter()
            data.batch(order[step], range(BATCH * step, BATCH * (step + 1)))
            times.append(time.perf_counter() - begin)
        begin, rest = time.perf_counter(), range(first + STEPS, min(first + gap, len(order)))
        for step in rest:
            order[step]
        if rest:
            found["order_us"].append((time.perf_counter() - begin) / len(rest) * 1e6)
        if times:
            found["step_ms"].append(statistics.median(times) * 1e3)
            found["mb"].append(memory() / 1e6)
    return found


def measure(rows: int, folder: Path) -> dict[str, Any]:
    stages, empty = Stages(rows), memory() / 1e6
    table = Table(tuple(map(made_up, range(rows))), (), "made up")
    shapes = assign_shapes([(row.width, row.height) for row in table.rows], 512, 64, buckets=True)
    stages.done("rows")
    base: Any = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, clip_skip=0, scaling_factor=1
    )
    names = TextNames(base, "text")
    moments, states = (serialize({"tensor": torch.zeros(shape)}, {}) for shape in ((8, 2, 2), (4, 4)))
    latents, texts = Shards(folder / "latents"), Shards(folder / "text")
    for row, shape in zip(table.rows, shapes, strict=True):
        latents.write(views_of(row, shape)[0].entry("vae"), moments)
        texts.write(names[row.caption], states)
    texts.write(names[""], states)
    latents.seal()
    texts.seal()
    stages.done("entries are written")
    del latents, texts
    gc.collect()
    stages.before = memory()
    latents, texts = Shards(folder / "latents"), Shards(folder / "text")
    stages.done("shards are opened")
    views = [views_of(row, shape)[0] for row, shape in zip(table.rows, shapes, strict=True)]
    assert not missing_views(views, latents, "vae")
    data = TrainingData(
        table,
        shapes,
        Cache(latents, NumberedNames(view.entry("vae") for view in views), base.device, 0),
        [1] * rows,
        base,
        text_states=Cache(texts, names, base.device, 0),
        token_ids=None,
        augmentation=Augmentation(),
        num_timesteps=1000,
        seed=0,
    )
    del views
    stages.done("a start with full caches")
    steps = EPOCHS * rows // BATCH
    order = SampleOrder(0, shapes, [1] * rows, BATCH, steps, EPOCHS * rows)
    walked = walk(order, data)
    stages.done("the whole run's order")
    shown = {
        "first_over_last_step": round(walked["step_ms"][-1] / walked["step_ms"][0], 3),
        "mb_grown_over_steps": round(walked["mb"][-1] - walked["mb"][1], 1),
        **{name: [round(each, 3) for each in values] for name, values in walked.items()},
    }
    files = [path.stat().st_size for path in folder.rglob("*.shard")]
    return {
        "rows": rows,
        "steps": steps,
        "mb_without_rows": round(empty),
        "stages": stages.found,
        "files": len(files),
        "walk": shown,
    }


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        summary = measure(args.rows, Path(name))
    walked = summary["walk"]
    print(f"ms a step by tenths     {walked['step_ms']}\nMB by tenths            {walked['mb']}")
    print(json.dumps({"benchmark": "scale", **summary}))


if __name__ == "__main__":
    main()
