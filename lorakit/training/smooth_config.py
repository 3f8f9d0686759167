"""The settings of smooth. No torch here."""

from pydantic import Field

from lorakit.ground.config import Config


class SmoothSettings(Config):
    """How evenly pictures shall move with their noise."""

    weight: float = Field(1.0, gt=0, description="of this part of the loss")
    decay: float = Field(0.01, gt=0, le=1, description="share of a step in the running mean of the rate")
