"""What style_transfer.py will do: its keys, and the pictures, sizes and ControlNet that they name. No torch here."""

import glob
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorakit.ground.errors import UserError
from lorakit.pictures.beside import caption_beside, without_style
from lorakit.pictures.images import IMAGE_SUFFIXES, image_size
from lorakit.sampling.config import SamplingConfig, shape_of
from lorakit.weights.base import BaseInfo
from lorakit.weights.controlnet import inspect_controlnet
from lorakit.weights.few_steps import refuse_few_steps
from lorakit.weights.hub import NOT_HERE
from lorakit.weights.vocabulary import read_vocabulary

CAPTION = "{caption}"
_WITHOUT = re.compile(rf"(?:[\s,]+(?:of|with|showing))?[\s,]*{re.escape(CAPTION)}")
CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
Threshold = Literal["auto"] | Annotated[float, Field(ge=0, le=2040)]


# fmt: off
class StyleConfig(SamplingConfig):
    """The keys of a config of style_transfer.py."""

    script: ClassVar[str] = "style_transfer.py"
    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"image": "Pictures", "start_from": "Restyling", "controlnet": "Edges"}

    image: str = Field(min_length=1, description="a picture, a folder of pictures, or a pattern such as photos/*.jpg")
    prompt: str = Field("", description="what the result shows, with the words of the style LoRA; {caption} in it is what metadata.jsonl or a .txt beside the picture says, without its words of style")
    caption_from: Literal["base"] | None = Field(None, description="caption of a picture that has none: base tries the words of a base with a closed vocabulary; null: it stays empty")
    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance, which doubles the work above 1; null: as the LoRA's file asks for, else 7.5, or 1 from a picture's own noise with an anchor")
    images_per_picture: int = Field(1, ge=1, le=1000, description="results for each picture, by seeds")

    start_from: Literal["noise", "inversion"] = Field("noise", description="noise: fresh noise of the seed is laid on the picture; inversion: the picture is led back to its own noise, and what is not restyled stays as it is")
    source_prompt: str = Field("{caption}", description="what the picture shows as it is, for its inversion: the prompt with other words of style, such as “a photo of {caption}”")
    anchor: float = Field(1.0, ge=0, le=1, description="share of what the picture's own step, without the style, misses its path by, by which each step from its own noise is put right; 1: what is not restyled stays, colours above all, and without a style the result is what the autoencoder makes of the picture, to the bit; 0: all is drawn in the style, for half of the work")
    strength: float = Field(0.6, gt=0, le=1, description="how far towards noise the picture is taken, and the share of the steps that is run; 1: its colours are forgotten")

    cache_dir: str | None = Field(None, min_length=1, description="inverted paths by content; null: <output_dir>/cache")

    colour: Literal["style", "input"] = Field("style", description="colours of the result: as they are drawn, or those of the input on the brightness that is drawn")

    controlnet: str | None = Field("auto", min_length=1, description="folder, .safetensors file or hub id of a ControlNet for Canny edges; auto: the base's own folder controlnet, if there is one; null: none, plain SDEdit")
    controlnet_conditioning_scale: float = Field(0.7, ge=0, le=2, description="how firmly the edges are held")
    control_guidance_start: float = Field(0.0, ge=0, le=1, description="share of the steps after which they begin to be")
    control_guidance_end: float = Field(1.0, ge=0, le=1, description="share after which they are no longer; 0.6 to 0.8 lets lines be restyled")
    canny_low: Threshold = Field("auto", description="Canny's lower threshold in OpenCV's units, where 100 is usual; auto: 0.4 of the upper one")
    canny_high: Threshold = Field("auto", description="upper threshold, where 200 is usual; auto: by the picture's own contrast")
    canny_blur: float = Field(1.0, ge=0, le=20, description="standard deviation of the blur before it, pixels; 0: none, as in OpenCV")

    axes: ClassVar[tuple[str, ...]] = (*SamplingConfig.axes, "prompt", "source_prompt", "start_from", "anchor", "strength", "colour", *CONTROL)
# fmt: on

    @model_validator(mode="after")
    def _agree(self):
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError("control_guidance_start, control_guidance_end: the first must be the smaller one")
        if self.canny_low != "auto" and self.canny_high != "auto" and self.canny_low > self.canny_high:
            raise ValueError("canny_low, canny_high: the first must not be above the second")
        if self.caption_from and not any(CAPTION in str(text) for text in (*self.own_texts().values(), *self.grid.get("prompt", ()))):
            raise ValueError("caption_from, prompt: there is no {caption} in prompt")
        if self.start_from == "inversion":
            self._check_path()
        return self

    def _check_path(self) -> None:
        if self.images_per_picture > 1:
            raise ValueError("images_per_picture, start_from: inversion draws no noise, every seed is the same; set start_from=noise")
        if self.scheduler not in (None, "ddim"):
            raise ValueError(f'scheduler, start_from: inversion goes back on the path of ddim; leave "{self.scheduler}" out, or set start_from=noise')
        if self.name == "cache" and self.cache_dir is None:
            raise ValueError('name "cache": names a folder that is in use; choose another')

    def own_texts(self) -> dict[str, str]:
        """The prompt, and what counts for an inversion."""
        return super().own_texts() | ({"source_prompt": self.source_prompt} if self.start_from == "inversion" else {})

    @property
    def is_anchored(self) -> bool:
        return self.start_from == "inversion" and self.anchor > 0

    def path_folder(self) -> Path:
        """Where inverted paths are kept."""
        return Path(self.cache_dir or Path(self.output_dir) / "cache")

    def resolved(self) -> tuple[Self, list[str]]:
        """As of SamplingConfig, but for the guidance of what is anchored, which is 1 where no key says more."""
        own: dict[str, Any] = {"guidance_scale": 1.0} if self.is_anchored and self.guidance_scale is None else {}
        return super(StyleConfig, self.model_copy(update=own)).resolved()


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


def controlnet_of(cfg: StyleConfig, info: BaseInfo) -> str | None:
    """The ControlNet that `auto` stands for, or the one that is named."""
    if cfg.controlnet != "auto":
        return cfg.controlnet
    own = info.root / "controlnet" if info.root else None
    return str(own) if own and own.is_dir() else None


def controlnet_parameters(cfg: StyleConfig, info: BaseInfo) -> int:
    """How many numbers the ControlNet has; 0 without one, or before it is here."""
    name = controlnet_of(cfg, info)
    places = inspect_controlnet(name, info).places if name and info.known else {}
    return sum(math.prod(place.shape) for place in places.values())


def notes_of(cfg: StyleConfig, info: BaseInfo, paths: list[str]) -> list[str]:
    """What a user should know before the work begins.

    Raises:
        UserError: steps that would not be any, a ControlNet that does not fit, or what has no path to its noise.
    """
    notes = [*info.notes, *_controlnet_notes(cfg, info)]
    for _, cell in cfg.numbered_cells():
        if cell.start_from == "inversion":
            _check_loras(cell)
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


def _check_loras(cell: StyleConfig) -> None:
    """Raises UserError: one under which a picture has no path to its noise, or that asks for another sampler."""
    scheduler = cell.resolved()[0].sampler()[0]  # which says what is missing, and how to make it
    paths = [lora.path for lora in (*cell.loras, *cell.prompt_loras()) if lora.weight]
    for path in paths:
        refuse_few_steps(path, "leave it out, or set start_from=noise")
    if scheduler != "ddim":
        raise UserError(f"start_from inversion goes back on the path of ddim, a LoRA asks for {scheduler}; set scheduler=ddim")


def path_lines(cells: list[StyleConfig]) -> list[str]:
    """What inversions need, for --check."""
    steps = {cell.resolved()[0].sampler()[1] for cell in cells if cell.start_from == "inversion"}
    return [f"paths       {sum(steps)} rows through the U-Net before, for each picture that has none yet"] if steps else []


def _controlnet_notes(cfg: StyleConfig, info: BaseInfo) -> list[str]:
    if not info.known or cfg.controlnet is None:
        return []
    if (name := controlnet_of(cfg, info)) is None:
        return [f"{info.name} has no ControlNet: plain SDEdit, so that strength alone keeps the scene"]
    is_here = inspect_controlnet(name, info).known
    return [] if is_here else [f"{name}: {NOT_HERE}: fetched from the hub when work starts"]


# ---- captions ----


def asks_for_captions(cfg: StyleConfig) -> bool:
    return any(CAPTION in text for _, cell in cfg.numbered_cells() for text in cell.own_texts().values())


def find_captions(cfg: StyleConfig, info: BaseInfo, paths: list[str]) -> tuple[list[str | None], list[str]]:
    """What stands beside each picture, None where the base is to say it; and what a user should know of it.

    Raises:
        UserError: as caption_beside.
        BaseError: as read_vocabulary.
    """
    if not asks_for_captions(cfg):
        return [""] * len(paths), []
    by_base = cfg.caption_from == "base" and read_vocabulary(info) is not None
    captions: list[str | None] = []
    notes: list[str] = []
    for path in paths:
        text, where = caption_beside(path)
        captions.append(without_style(text) if text else None if by_base else "")
        if text:
            notes.append(f"{path}: caption “{captions[-1]}”, from {where}")
        elif not by_base:
            notes.append(f"{path}: has no caption beside it: {CAPTION} stays empty")
    if cfg.caption_from == "base" and not by_base and "" in captions:
        notes.append(f"caption_from: {info.name} has no closed vocabulary to try; write captions beside the pictures")
    return captions, notes


def with_caption(cfg: StyleConfig, caption: str) -> StyleConfig:
    """The config of one picture; without a caption the word that leads to it, such as “of”, goes too."""
    filled = {
        key: text.replace(CAPTION, caption) if caption else _WITHOUT.sub("", text).strip()
        for key, text in cfg.own_texts().items()
    }
    return cfg.model_copy(update=filled | {"caption_from": None})
