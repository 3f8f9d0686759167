"""Peak memory of a training, as the system counts it, beside what --check predicts. Linux, on the CPU.

    python benchmarks/memory.py cfg/sd15/mountain.json mixed_precision=bf16 resolution=256 max_train_steps=3

Arguments are those of train_lora.py. Anonymous memory is what a process really needs; what is mapped from the
weights' files the system takes back when it is short. Runs train_lora.py in a process of its own and prints
one JSON line, in MB: the prediction, the peaks of both kinds, before the first step and from then on.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorakit.ground.command import parse_command  # noqa: E402
from lorakit.training.config import TrainConfig  # noqa: E402
from lorakit.training.forecast import checkpoint_bytes, predict_memory  # noqa: E402
from lorakit.training.plan import make_plan  # noqa: E402

PERIOD = 0.005  # seconds between two looks


def resident(pid: int) -> dict[str, int]:
    """Bytes that a process has in memory: `anonymous` and `mapped`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {
        key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key in KEYS
    }
    return {name: 1024 * sizes.get(key, 0) for key, name in KEYS.items()}


KEYS = {"RssAnon": "anonymous", "RssFile": "mapped"}


def watch(process: subprocess.Popen, metrics: Path) -> dict[str, dict[str, int]]:
    """Peaks of a process until it ends, by phase: `preparing` until `metrics` has a line, then `steps`."""
    peaks: dict[str, dict[str, int]] = {"preparing": {}, "steps": {}}
    phase = "preparing"
    while process.poll() is None:
        if phase == "preparing" and metrics.exists() and metrics.stat().st_size:
            phase = "steps"
        try:
            found = resident(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            break
        peaks[phase] = {key: max(size, peaks[phase].get(key, 0)) for key, size in found.items()}
        time.sleep(PERIOD)
    return peaks


def main(argv: list[str]) -> int:
    argv = [*argv, "overwrite=true", "logging_steps=1", "sample_steps=0", "validation_steps=0"]
    cfg = parse_command(TrainConfig, argv, prog="benchmarks/memory.py", description=str(__doc__)).config
    plan = make_plan(cfg)
    half = cfg.mixed_precision in ("bf16", "fp16")
    predicted = predict_memory(cfg, plan, half)
    command = [sys.executable, "train_lora.py", *argv]
    run = Path(cfg.output_dir) / cfg.ckpt_name
    (run / "metrics.jsonl").unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    peaks = watch(process, ROOT / run / "metrics.jsonl")
    if process.wait():
        return process.returncode
    disk = max(
        sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        for checkpoint in (ROOT / run).glob("checkpoint-*")
    )
    record = {
        "base": cfg.pretrained_model_name_or_path,
        "precision": cfg.mixed_precision,
        "predicted_mb": round(sum(predicted.values()) / 1e6),
        "peaks_mb": {phase: {k: round(v / 1e6) for k, v in own.items()} for phase, own in peaks.items()},
        "checkpoint_mb": {"predicted": checkpoint_bytes(cfg, plan.base) / 1e6, "written": disk / 1e6},
        "parts_mb": {key: round(size / 1e6) for key, size in predicted.items()},
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    from lorakit.ground.process import run_guarded

    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
