"""Trainings that benchmarks compare, each made once."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train_once(config: str, folder: Path, name: str, seed: int, settings: Sequence[str]) -> Path:
    """The LoRA `name` in `folder`, by train_lora.py where neither it nor words of that name are there."""
    path = folder / f"{name}.safetensors"
    if not path.exists() and not (folder / f"{name}_words").exists():
        own = [f"output_dir={folder}", f"ckpt_name={name}", f"seed={seed}", "overwrite=true"]
        quiet = ["report_to=null", "sample_steps=0", "validation_steps=0"]
        command = [sys.executable, "train_lora.py", config, *settings, *own, *quiet]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return path
