"""LoRAs that a film wants and that do not exist yet, fitted to their pictures by train_lora.py. No torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lorakit.film.config import MorphConfig, Picture
from lorakit.film.morph_plan import MorphPlan
from lorakit.ground.errors import StoppedError, UserError
from lorakit.ground.process import StopFlag
from lorakit.ground.publish import make_folder, publish_file
from lorakit.pictures.images import read_picture, save_png

LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
)


def fit_missing(cfg: MorphConfig, plan: MorphPlan, folder: Path, stop: StopFlag, script: Path) -> None:
    """Train a LoRA on each picture that has none yet, with the picture as the film shows it.

    Args:
        script: train_lora.py.

    Raises:
        UserError: a training failed; its own message stands above.
        StoppedError: a signal came, to this process or to the training.
    """
    for path in plan.missing:
        picture = next(picture for picture in cfg.images if picture.lora == path)
        words = _training_words(cfg, plan, picture, Path(path), folder / "fit" / Path(path).stem)
        print(f"fitting     {path} to {picture.path}", flush=True)
        alone = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        training = subprocess.Popen([sys.executable, str(script), cfg.fit_config, *words], env=alone)
        while training.poll() is None:
            time.sleep(0.1)
            if stop.poll():  # SIGTERM also after a Ctrl-C, which may have reached this process alone
                training.terminate()
        code = training.returncode
        if stop.signum or code in (130, 143):  # before its handlers stand, a signal ends it in other ways
            signum = stop.signum or code - 128
            raise StoppedError(f"while {path} was trained; the same command goes on", signum)
        if code or not Path(path).exists():
            raise UserError(f"{path}: its training failed (exit code {code}); the lines above say why")


def _training_words(cfg: MorphConfig, plan: MorphPlan, picture: Picture, lora: Path, data: Path) -> list[str]:
    """Settings of train_lora.py, which override the fit_config; the picture and its caption go to `data`."""
    make_folder(data)
    save_png(read_picture(picture.path, plan.shape), data / "picture.png")
    line = {"file_name": "picture.png", "text": picture.prompt}
    publish_file(data / "metadata.jsonl", json.dumps(line).encode())
    width, height = plan.shape
    settings = {
        "pretrained_model_name_or_path": cfg.pretrained_model_name_or_path,
        "base_config": cfg.base_config,
        "prediction_type": cfg.prediction_type,
        "clip_skip": cfg.clip_skip,
        "data_dir": str(data),
        "output_dir": str(lora.parent),
        "ckpt_name": lora.stem,
        "resolution": round((width * height) ** 0.5),
        "aspect_ratio_buckets": width != height,
        "missing_captions": "empty",
        "resume_from_checkpoint": "latest",
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
