"""Whole trainings of any objective, straight or stopped and resumed."""

import json
import os
import random
import signal
import sys
import time
from multiprocessing import get_context
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


def train_quietly(arguments: list[str]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    sys.exit(train_lora.main(arguments))


def killed_and_resumed(arguments: list[str], run: Path, times: int) -> int:
    """Kill -9 a run without end at random moments and start it again, so often; lines of its metrics.jsonl.

    Children are forked from a server that has imported the libraries and runs no thread of its own.
    """
    rng, log = random.Random(0), run / "metrics.jsonl"
    server = get_context("forkserver")
    server.set_forkserver_preload(["torch", "accelerate", "peft", "diffusers.models", "transformers"])

    def lines() -> int:
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    for _ in range(times):
        process = server.Process(target=train_quietly, args=(arguments,))
        target = lines() + rng.randint(0, 9)
        process.start()
        while lines() < target:
            assert process.is_alive(), "the child ended before it was killed"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    return lines()
