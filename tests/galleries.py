"""What the tests of the sampling scripts share: a command line, and a look at what came of it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from small import settings_of

ONE_LEVEL = 1
"""Of 255: what rounding may change where only the batch differs."""


def command_line(folder: Path, base: Path, keys: Mapping[str, Any], *more: str) -> list[str]:
    """Of a run into `folder`/out/run; an empty config stands for the script's default one."""
    config = folder / "empty.json"
    config.write_text("{}")
    common = dict(pretrained_model_name_or_path=str(base), output_dir=str(folder / "out"), name="run")
    return [str(config), *more, *settings_of(**(common | dict(keys)))]


def runner(script: Any, arguments: Callable[..., list[str]], folder: Path) -> Callable[..., Path]:
    """Factory that runs a script in this process by its `arguments`, and returns the folder of the run."""

    def run(*more: str, **changes: Any) -> Path:
        assert script.main(arguments(*more, **changes)) == 0
        return folder / "out" / changes.get("name", "run")

    return run


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def pictures_in(folder: Path) -> list[np.ndarray]:
    return [levels(path) for path in sorted(folder.glob("[0-9]*.png"))]


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def save_controlnet(folder, unet, seed=None, channels=(8, 16)):
    """A ControlNet as training starts with, of no effect; with a seed its zero convolutions are filled."""
    from diffusers import ControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    if seed is not None:
        zeros = [p for p in controlnet.parameters() if not p.any() and p.ndim == 4]
        assert len(zeros) >= 5
        generator = torch.Generator().manual_seed(seed)
        for parameter in zeros:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    controlnet.save_pretrained(folder)
    return str(folder)
