"""LoRAs that a film wants and that do not exist yet. No torch."""

from pathlib import Path

from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import MorphPlan
from lorakit.ground.process import StopFlag
from lorakit.sampling.fitting import fit_lora, picture_fit


def fit_missing(cfg: MorphConfig, plan: MorphPlan, folder: Path, stop: StopFlag, script: Path) -> None:
    """Train a LoRA on each picture that has none yet, with the picture as the film shows it.

    Raises:
        UserError, StoppedError: as fit_lora.
    """
    for path in plan.missing:
        picture = next(picture for picture in cfg.images if picture.lora == path)
        fit_lora(picture_fit(cfg, path, picture.path, picture.prompt, plan.shape, folder), stop, script)
