"""A LoRA of the picture, fitted before it is changed. No torch here."""

from collections.abc import Iterable
from pathlib import Path

from lorakit.editing.config import PictureConfig
from lorakit.ground.process import StopFlag
from lorakit.sampling.fitting import fit_lora, picture_fit


def fit_missing(
    cfg: PictureConfig, missing: Iterable[str], shape: tuple[int, int], folder: Path, script: Path
) -> None:
    """Train those that are not there yet; a signal stops it where the same command goes on.

    Args:
        shape: (width, height) at which the picture is seen; `folder` of the run.
        script: train_lora.py.

    Raises:
        UserError, StoppedError: as fit_lora.
    """
    with StopFlag() as stop:
        for lora in missing:
            fit_lora(picture_fit(cfg, lora, cfg.image, cfg.prompt, shape, folder), stop, script)
