"""Whole trainings of any objective, straight or stopped and resumed."""

import json
from pathlib import Path

import pytest

import train_lora
from lorakit.ground.config import load_config
from lorakit.ground.errors import StoppedError
from lorakit.training.config import TrainConfig
from lorakit.training.plan import make_plan
from lorakit.training.resume import find_start


def config_of(arguments: list[str]) -> TrainConfig:
    return load_config(TrainConfig, None, arguments).config


def train_run(arguments: list[str], stop: int | None = None) -> list[Path]:
    """Train, and where `stop` is given stop after so many steps and go on; the files that it writes."""
    cfg = config_of(arguments)
    plan, folder = make_plan(cfg), Path(cfg.output_dir) / cfg.ckpt_name
    resume = None
    if stop:
        with pytest.raises(StoppedError):
            train_lora.train(cfg, plan, folder, stop_after=stop)
        again = cfg.model_copy(update={"resume_from_checkpoint": "latest"})
        resume, _ = find_start(again, plan, folder, owner=True)
    return train_lora.train(cfg, plan, folder, resume)


def steps_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that tell of a step's loss."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]
