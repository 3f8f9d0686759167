"""What an inversion will do, worked out from its config and from files' headers. No torch here."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.pictures.images import image_size
from lorakit.pictures.views import assign_shapes
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import (
    BaseConfig,
    ClipSkip,
    PredictionType,
    check_clip_skip,
    clip_skip_notes,
)
from lorakit.weights.few_steps import few_steps
from lorakit.weights.tokens import unread_notes

Solver = Literal["ddim", "ab2"]
"""Described in schedule.py."""
Method = Literal["ddim", "ab2", "fixed_point", "obelm", "null_text", "anchored"]
"""Described in inversion.py."""
FIT_TIMESTEPS = (0.2, 0.4, 0.6, 0.8)
"""Shares of the schedule at which LoRAs are tried on a picture before it is inverted under them."""


def inversion_evaluations(steps: int, method: str, iterations: int = 0) -> int:
    """Of the U-Net, for one picture without guidance; fixed_point may need fewer."""
    return {"fixed_point": steps * (iterations + 2), "ab2": steps + (steps > 1)}.get(method, steps)


class InvertConfig(Config):
    """The keys of an inversion's config."""

    headings: ClassVar[dict[str, str]] = {
        "image": "Picture",
        "pretrained_model_name_or_path": "Model",
        "num_inference_steps": "Inversion",
        "output_dir": "Output",
    }

    image: str = Field("dataset/mountain/mountain.jpg", min_length=1, description="the picture")
    prompt: str = Field("", description="what it shows")
    negative_prompt: str = Field("", description="of no effect at guidance 1")
    width: int | None = Field(
        None, ge=16, description="pixels; null: near the picture's own aspect at the base's area"
    )
    height: int | None = Field(None, ge=16, description="pixels; give both or neither")
    pretrained_model_name_or_path: str = Field(
        "ckpt/miniature",
        min_length=1,
        description="base model: diffusers folder, hub id or single .safetensors file",
    )
    base_config: BaseConfig = None
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None
    lora: str | None = Field(None, description="a LoRA file, such as one fitted to the picture; null: none")
    lora_weight: float = Field(1.0, description="factor on the LoRA's update")
    num_inference_steps: int = Field(50, ge=1, le=999, description="DDIM steps, there and back alike")
    guidance_scales: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (1.0, 3.0), min_length=1, description="classifier-free guidance; above 1 doubles the work"
    )
    methods: tuple[Method, ...] = Field(
        ("ddim", "ab2", "fixed_point", "obelm", "null_text", "anchored"),
        min_length=1,
        description="null_text is left out at guidance 1, where it is ddim",
    )
    output_dir: str = Field("out/invert", min_length=1, description="where the folder of the picture goes")

    @model_validator(mode="after")
    def _agree(self):
        if (self.width is None) != (self.height is None):
            raise ValueError("width, height: give both or neither")
        if set(self.methods) == {"null_text"} and max(self.guidance_scales) == 1:
            raise ValueError("methods, guidance_scales: null_text needs a guidance above 1")
        return self


@dataclass(frozen=True)
class InversionPlan:
    """`size` is (width, height) at which the base sees the picture, a run a guidance with a method."""

    base: BaseInfo
    size: tuple[int, int]
    runs: tuple[tuple[float, Method], ...]
    notes: tuple[str, ...]


def make_inversion_plan(cfg: InvertConfig) -> InversionPlan:
    """Check base, picture, LoRA and size, and pair every guidance with every method that it goes with.

    Raises:
        UserError: what is missing, unreadable or does not fit together.
    """
    base = inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_clip_skip(base, cfg.clip_skip)
    own = image_size(cfg.image)
    notes = [*base.notes, *clip_skip_notes(cfg.clip_skip, [cfg.lora] if cfg.lora else [])]
    if cfg.lora and (found := few_steps(cfg.lora)):
        if found.is_told:
            raise UserError(
                f"{cfg.lora}: is a LoRA for sampling in few steps ({found.text}), under which a picture "
                "has no DDIM path to its noise; set lora to null, or name one that was fitted to the picture"
            )
        notes.append(
            f"{cfg.lora}: looks like a LoRA for sampling in few steps ({found.word!r} in {found.text!r}), "
            "under which a picture has no DDIM path to its noise"
        )
    if cfg.width is None or cfg.height is None:
        size = assign_shapes([own], base.resolution, base.size_multiple, True)[0]
    elif base.known and (cfg.width % base.vae_factor or cfg.height % base.vae_factor):
        raise UserError(f"width, height: both must divide by the VAE's factor, {base.vae_factor}")
    else:
        size = cfg.width, cfg.height
    scales = cfg.guidance_scales
    runs: list[tuple[float, Method]] = [
        (scale, method) for scale in scales for method in cfg.methods if scale > 1 or method != "null_text"
    ]
    if max(scales) > 1 and cfg.prompt == cfg.negative_prompt:
        notes.append("prompt and negative_prompt are the same, so that guidance changes nothing")
    return InversionPlan(base, size, tuple(runs), (*notes, *unread_notes(base, prompts_of(cfg))))


def prompts_of(cfg: InvertConfig) -> tuple[str, ...]:
    return cfg.prompt, cfg.negative_prompt
