"""The trained parts as a diffusers folder, which every Stable Diffusion tool loads."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from miniature.diffusion import SCHEDULER
from miniature.scene import vocabulary


def save_base(
    folder: Path, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, dtype: torch.dtype
) -> None:
    """Write tokenizer, captions, text encoder, U-Net, autoencoder and scheduler, weights as `dtype`.

    The live modules keep their own dtype.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    make: Any = StableDiffusionPipeline
    pipe = make(
        vae=_copy(vae, dtype),
        text_encoder=_copy(text_encoder, dtype),
        tokenizer=tokenizer,
        unet=_copy(unet, dtype),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if folder.exists():
        shutil.rmtree(folder)
    pipe.save_pretrained(folder)
    (folder / "captions.json").write_text(json.dumps(vocabulary(), indent=1) + "\n", encoding="utf-8")
    _make_public(folder)


def save_part(folder: Path, part: Any, dtype: torch.dtype) -> None:
    """Write one model, an autoencoder or a ControlNet."""
    if folder.exists():
        shutil.rmtree(folder)
    _copy(part, dtype).save_pretrained(folder)
    _make_public(folder)


def _make_public(folder: Path) -> None:
    """The umask says who may read, where safetensors leaves files to their owner; no path of this machine."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(allowed)


def _copy(module: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(module).to(device="cpu", dtype=dtype, memory_format=torch.contiguous_format)
