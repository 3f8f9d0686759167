"""The settings of lcm, sampling in few steps. No torch here."""

from typing import Any, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.sampling.config import LCM_STEPS

TEACHER = "teacher_"
"""How the names of the teacher's adapters begin in a live U-Net."""


# fmt: off
class TeacherLora(Config):
    """A LoRA that the teacher has and the student learns with its few steps."""

    path: str = Field(min_length=1, description="a LoRA file of any layout, of the U-Net alone")
    weight: float = Field(1.0, description="factor on its update")


class LcmSettings(Config):
    """How the teacher's steps are taken, and with what sampler the student is used."""

    guidance_scale: float | tuple[float, float] = Field(8.5, description="of the teacher, which the student learns to do without: one number, or the two between which it is drawn for each sample; 1 more than the paper's w")
    solver_steps: Literal[50, 100, 200, 250, 500, 1000] = Field(LCM_STEPS, description="DDIM steps of the teacher from noise to picture, of which the student learns to skip any number")
    huber: float = Field(1e-3, gt=0, description="c of the loss sqrt(d^2 + c^2) - c")
    num_inference_steps: int = Field(4, ge=1, le=LCM_STEPS, description="steps that the file asks for when it is used, and that samples of the run take")
    teacher_loras: tuple[TeacherLora, ...] = Field((), description="LoRAs that the teacher has and the student starts without, so that one file holds a style and its few steps")

    @model_validator(mode="after")
    def _agree(self):
        low, high = self.guidance
        if not 1 <= low <= high:
            raise ValueError("guidance_scale: 1 or more, the lower of two numbers first")
        return self

    @property
    def guidance(self) -> tuple[float, float]:
        """The lowest and the highest that is drawn."""
        given = self.guidance_scale
        return given if isinstance(given, tuple) else (given, given)
# fmt: on


def lcm_settings(cfg: Any) -> LcmSettings:
    """Of a config whose objective is lcm."""
    return cfg.lcm or LcmSettings.model_validate({})


def lcm_sampler(cfg: Any) -> dict[str, Any]:
    """What the LoRA's file asks for when it is used: guidance is in its weights."""
    steps = lcm_settings(cfg).num_inference_steps
    return {"scheduler": "lcm", "num_inference_steps": steps, "guidance_scale": 1.0}


def teacher_loras(cfg: Any) -> tuple[TeacherLora, ...]:
    """Those of the teacher, in any config."""
    return cfg.lcm.teacher_loras if cfg.lcm else ()
