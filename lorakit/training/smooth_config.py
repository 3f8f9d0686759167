"""The settings of smooth. No torch here."""

from typing import Any

from pydantic import Field

from lorakit.ground.config import Config


# fmt: off
class SmoothSettings(Config):
    """How evenly pictures shall move with their noise."""

    weight: float = Field(1.0, gt=0, description="of this part of the loss")
    every: int = Field(2, ge=1, description="every how many samples one is differentiated twice, with as many times the weight; 1: each, at 2.8 times the cost of a step")
    decay: float = Field(0.01, gt=0, le=1, description="share of a step in the running mean of the rate")
# fmt: on


def smooth_settings(cfg: Any) -> SmoothSettings:
    """Those of a config, or the defaults."""
    return cfg.smooth or SmoothSettings.model_validate({})
