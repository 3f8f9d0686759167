"""What style_transfer.py will do: its keys, and the pictures, sizes and ControlNet that they name. No torch here."""

import glob
import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.errors import UserError
from lorakit.pictures.images import IMAGE_SUFFIXES, image_size
from lorakit.pictures.views import assign_shapes
from lorakit.sampling.config import SamplingConfig
from lorakit.weights.base import BaseInfo
from lorakit.weights.controlnet import inspect_controlnet
from lorakit.weights.hub import NOT_HERE

CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
Threshold = Literal["auto"] | Annotated[float, Field(ge=0, le=2040)]


# fmt: off
class StyleConfig(SamplingConfig):
    """The keys of a config of style_transfer.py."""

    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"image": "Pictures", "strength": "Restyling", "controlnet": "Edges"}

    image: str = Field(min_length=1, description="a picture, a folder of pictures, or a pattern such as photos/*.jpg")
    prompt: str = Field("", description="what the result shows, with the words of the style LoRA")
    images_per_picture: int = Field(1, ge=1, le=1000, description="results for each picture")

    strength: float = Field(0.6, gt=0, le=1, description="how far towards noise the picture is taken, and the share of the steps that is run; 1: its colours are forgotten")

    controlnet: str | None = Field("auto", min_length=1, description="folder, .safetensors file or hub id of a ControlNet for Canny edges; auto: the base's own folder controlnet, if there is one; null: none, plain SDEdit")
    controlnet_conditioning_scale: float = Field(0.7, ge=0, le=2, description="how firmly the edges are held")
    control_guidance_start: float = Field(0.0, ge=0, le=1, description="share of the steps after which they begin to be")
    control_guidance_end: float = Field(1.0, ge=0, le=1, description="share after which they are no longer; 0.6 to 0.8 lets lines be restyled")
    canny_low: Threshold = Field("auto", description="Canny's lower threshold in OpenCV's units, where 100 is usual; auto: 0.4 of the upper one")
    canny_high: Threshold = Field("auto", description="upper threshold, where 200 is usual; auto: by the picture's own contrast")
    canny_blur: float = Field(1.0, ge=0, le=20, description="standard deviation of the blur before it, pixels; 0: none, as in OpenCV")

    axes: ClassVar[tuple[str, ...]] = (*SamplingConfig.axes, "prompt", "strength", *CONTROL)
# fmt: on

    @model_validator(mode="after")
    def _agree(self):
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError("control_guidance_start, control_guidance_end: the first must be the smaller one")
        if self.canny_low != "auto" and self.canny_high != "auto" and self.canny_low > self.canny_high:
            raise ValueError("canny_low, canny_high: the first must not be above the second")
        return self


def find_pictures(pattern: str) -> list[str]:
    """The pictures that `image` names, sorted.

    Raises:
        UserError: none.
    """
    if os.path.isfile(pattern):
        return [pattern]
    is_folder = os.path.isdir(pattern)
    names = [str(each) for each in Path(pattern).iterdir()] if is_folder else glob.glob(pattern, recursive=True)
    found = sorted(n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and Path(n).is_file())
    if not found:
        what = "holds no picture" if is_folder else "no such picture, folder or match"
        raise UserError(f"image {pattern}: {what}; name a picture, a folder of them, or a pattern")
    return found


def shape_of(cfg: StyleConfig, info: BaseInfo, path: str) -> tuple[int, int]:
    """Width and height at which a picture is restyled."""
    if cfg.width and cfg.height:
        return cfg.width, cfg.height
    return assign_shapes([image_size(path)], info.resolution, info.size_multiple, True)[0]


def controlnet_of(cfg: StyleConfig, info: BaseInfo) -> str | None:
    """The ControlNet that `auto` stands for, or the one that is named."""
    if cfg.controlnet != "auto":
        return cfg.controlnet
    own = info.root / "controlnet" if info.root else None
    return str(own) if own and own.is_dir() else None


def notes_of(cfg: StyleConfig, info: BaseInfo, paths: list[str]) -> list[str]:
    """What a user should know before the work begins.

    Raises:
        UserError: steps that would not be any, or a ControlNet that does not fit.
    """
    notes = [*info.notes, *_controlnet_notes(cfg, info)]
    for _, cell in cfg.numbered_cells():
        cell, own = cell.resolved()
        notes += own
        steps = cell.sampler()[1]
        if int(steps * cell.strength) < 1:
            raise UserError(
                f"strength {cell.strength:g} of {steps} steps is less than one step; raise either of them"
            )
    for path in paths:
        size, shape = image_size(path), shape_of(cfg, info, path)
        if size != shape:
            notes.append(f"{path} is {size[0]}x{size[1]}, restyled at {shape[0]}x{shape[1]}")
    return notes


def _controlnet_notes(cfg: StyleConfig, info: BaseInfo) -> list[str]:
    if not info.known or cfg.controlnet is None:
        return []
    if (name := controlnet_of(cfg, info)) is None:
        return [f"{info.name} has no ControlNet: plain SDEdit, so that strength alone keeps the scene"]
    is_here = inspect_controlnet(name, info).known
    return [] if is_here else [f"{name}: {NOT_HERE}: fetched from the hub when work starts"]
