"""A LoRA that is wanted and does not exist yet, fitted to its picture by train_lora.py. No torch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.ground.errors import StoppedError, UserError
from lorakit.ground.process import StopFlag
from lorakit.ground.publish import make_folder, publish_file
from lorakit.pictures.images import read_picture, save_png

OF_THE_BASE = ("pretrained_model_name_or_path", "base_config", "prediction_type", "clip_skip")
"""Keys that a LoRA and what it is used with must share."""
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
)


@dataclass(frozen=True)
class Fit:
    """A LoRA to be made of one picture.

    Args:
        shape: (width, height) at which it is seen.
        config: of the training; `settings` override it.
        data: folder for the picture and its caption, as it is seen.
    """

    lora: str
    picture: str
    prompt: str
    shape: tuple[int, int]
    config: str
    data: Path
    settings: dict[str, Any] = field(default_factory=dict)


def picture_fit(cfg: Any, lora: str, picture: str, prompt: str, shape: tuple[int, int], folder: Path) -> Fit:
    """The fit that a script's config asks for: by its fit_config, on its base.

    Args:
        cfg: has OF_THE_BASE and `fit_config`.
        shape: (width, height) at which the picture is seen; `folder` of the run.
    """
    base = {key: getattr(cfg, key) for key in OF_THE_BASE}
    return Fit(lora, picture, prompt, shape, cfg.fit_config, folder / "fit" / Path(lora).stem, base)


def fit_lora(fit: Fit, stop: StopFlag, script: Path) -> None:
    """Train it, going on where an earlier training was stopped.

    Args:
        script: train_lora.py.

    Raises:
        UserError: the training failed; its own message stands above.
        StoppedError: a signal came, to this process or to the training.
    """
    print(f"fitting     {fit.lora} to {fit.picture}", flush=True)
    alone = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    training = subprocess.Popen([sys.executable, str(script), fit.config, *_training_words(fit)], env=alone)
    while training.poll() is None:
        time.sleep(0.1)
        if stop.poll():  # SIGTERM also after a Ctrl-C, which may have reached this process alone
            training.terminate()
    code = training.returncode
    if stop.signum or code in (130, 143):  # before its handlers stand, a signal ends it in other ways
        signum = stop.signum or code - 128
        raise StoppedError(f"while {fit.lora} was trained; the same command goes on", signum)
    if code or not Path(fit.lora).exists():
        raise UserError(f"{fit.lora}: its training failed (exit code {code}); the lines above say why")


def missing_loras(
    loras: Sequence[str], train_if_missing: bool, fit_config: str, none: str = "its lora to null"
) -> tuple[str, ...]:
    """Those that are to be trained first.

    Args:
        none: how to do without, for the message.

    Raises:
        UserError: they may not be trained, or cannot be by these names and this config.
    """
    missing = tuple(path for path in loras if not Path(path).exists())
    if missing and not train_if_missing:
        raise UserError(
            f"{missing[0]}: no such LoRA file; train it (python train_lora.py …), set train_if_missing=true "
            f"to fit one to the picture first, or set {none}"
        )
    if unnamed := [path for path in missing if Path(path).suffix != ".safetensors" or path.endswith("/")]:
        raise UserError(f"{unnamed[0]}: a LoRA that is to be trained needs a name that ends in .safetensors")
    if missing and not Path(fit_config).is_file():
        raise UserError(f"fit_config {fit_config}: no such config, and {missing[0]} is to be trained")
    return missing


def _training_words(fit: Fit) -> list[str]:
    """Settings of train_lora.py, which override its config; the picture and its caption go to `data`."""
    make_folder(fit.data)
    save_png(read_picture(fit.picture, fit.shape), fit.data / "picture.png")
    line = {"file_name": "picture.png", "text": fit.prompt}
    publish_file(fit.data / "metadata.jsonl", json.dumps(line).encode())
    width, height = fit.shape
    settings = {
        "data_dir": str(fit.data),
        "output_dir": str(Path(fit.lora).parent),
        "ckpt_name": Path(fit.lora).stem,
        "resolution": round((width * height) ** 0.5),
        "aspect_ratio_buckets": width != height,
        "missing_captions": "empty",
        "resume_from_checkpoint": "latest",
    } | fit.settings
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
