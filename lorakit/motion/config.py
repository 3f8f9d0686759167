"""The keys of animate.py. No torch here."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.sampling.config import LoraEntry, SamplingConfig

Keys = float | Annotated[tuple[float, ...], Field(min_length=2)]
DRAWING = ("euler_a", "lcm")
"""Samplers that draw noise on their way, which would lie in no scene."""


# fmt: off
class Camera(Config):
    """What the camera does over the film, all at once. A list holds at moments spread evenly over the film."""

    pan: Keys = Field(0.0, description="widths of the picture by which it moves to the right; negative: to the left")
    tilt: Keys = Field(0.0, description="heights of the picture by which it moves upwards")
    zoom: Keys = Field(1.0, description="factor by which things grow; below 1 they shrink")
    roll: Keys = Field(0.0, description="degrees by which it turns clockwise, so that the picture turns the other way")
    easing: Literal["linear", "cosine"] = Field("linear", description="even speed; or slow at each moment of a list, and at both ends")

    def keys(self) -> dict[str, list[float]]:
        """The values at the moments of each; one number is where the film ends, and it begins at rest."""
        rest = {"pan": 0.0, "tilt": 0.0, "zoom": 1.0, "roll": 0.0}
        own = {name: getattr(self, name) for name in rest}
        return {name: [rest[name], keys] if isinstance(keys, float | int) else list(keys) for name, keys in own.items()}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if min(self.keys()["zoom"]) < 0.1 or max(self.keys()["zoom"]) > 8:
            raise ValueError("zoom: from 0.1 to 8")
        return self


class AnimateConfig(SamplingConfig):
    """The keys of a config of animate.py."""

    script: ClassVar[str] = "animate.py"
    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"prompt": "Film", "image": "Picture", "camera.pan": "Camera and scene", "motion_adapter": "Motion adapter", "formats": "Files"}

    output_dir: str = Field("out/animate", min_length=1, description="where the folder of the film goes")
    name: str = Field("film", pattern=r"^[^/\\\x00]+$", description="name of that folder")
    overwrite: bool = Field(False, description="replace another film in it; the same film goes on")

    prompt: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field("", description="what the film shows; a list: one for each of as many moments, spread evenly over the film, and mixtures between them")
    frames: int = Field(16, ge=2, le=10_000, description="frames of the film")
    fps: float = Field(8.0, gt=0, le=60, description="frames a second")
    loop: bool = Field(False, description="the film ends where it begins: camera and prompts go back to their first values")

    image: str | None = Field(None, min_length=1, description="a picture that the film starts from: frames with the camera at rest are what the autoencoder makes of it, to the bit, others what the camera sees of it, and the base invents what lies beyond; null: none")
    lora: str | None = Field(None, min_length=1, description="a LoRA fitted to that picture, which keeps photographs what they are; null: none")
    train_if_missing: bool = Field(False, description="fit it, if there is no such file yet, by train_lora.py with fit_config")
    fit_config: str = Field("cfg/edit/fit.json", min_length=1, description="training config for it")

    camera: Camera = Field(Camera(pan=0.0, tilt=0.0, zoom=1.0, roll=0.0, easing="linear"), description="what the camera does")
    scene_share: float = Field(1.0, ge=0, le=1, description="share of the noise's variance that lies in the scene and is seen through the camera; the rest is each frame's own")
    agreement: float = Field(0.8, ge=0, le=1, description="share of the steps, from the noisy end, in which frames agree about the scene: what each expects of it is moved by the camera and averaged; more moves more surely and is softer")
    agreement_reach: float = Field(4.0, gt=0, description="frames over which they agree, as a deviation")

    motion_adapter: str | None = Field(None, min_length=1, description="a motion adapter: diffusers' folder or one file of AnimateDiff's (.safetensors); null: none")
    window: int | None = Field(None, ge=2, description="frames that the adapter looks along at once; null: its positions, 16 at most. A longer film is made in windows that overlap")
    overlap: int | None = Field(None, ge=1, description="frames that neighbouring windows share; null: a quarter of a window")
    beta_schedule: Literal["linear", "scaled_linear"] | None = Field(None, description="noise schedule; linear: as AnimateDiff's adapters were trained; null: the base's")

    formats: tuple[Literal["gif", "webp", "apng", "mp4"], ...] = Field(("gif", "webp"), description="animations besides the PNG frames; mp4 needs imageio-ffmpeg or av")
    hold_ms: int = Field(0, ge=0, le=60_000, description="milliseconds that the first and last frame stay longer")
    pingpong: bool = Field(False, description="play back to the first frame, so that the animation has no jump")
    min_side: int = Field(256, ge=1, le=4096, description="pixels: smaller frames are enlarged in animations (never in frames/)")
# fmt: on

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.grid:
            raise ValueError("grid: a film has none; run animate.py once for each value")
        if not isinstance(self.prompt, str) and len(self.prompt) > self.frames:
            raise ValueError(f"prompt, frames: {len(self.prompt)} prompts for {self.frames} frames")
        if self.image is None and self.lora:
            raise ValueError("lora, image: a LoRA is fitted to a picture; name it as image, or put the file into loras")
        if self.image and self.scheduler not in (None, "ddim"):
            raise ValueError(f'scheduler "{self.scheduler}": a picture is inverted on the path of ddim; leave it out')
        if self.image and any(keys[0] != (1 if name == "zoom" else 0) for name, keys in self.camera.keys().items()):
            raise ValueError("image, camera: the film starts on the picture, with the camera at rest: lists begin with 0, zoom's with 1")
        if self.motion_adapter is None and (self.window or self.overlap):
            raise ValueError("window, motion_adapter: only an adapter looks along frames; leave window and overlap out")
        if self.window and self.overlap and self.overlap >= self.window:
            raise ValueError(f"overlap, window: windows of {self.window} frames share {self.window - 1} at most")
        return self

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    def all_loras(self) -> tuple[LoraEntry, ...]:
        """Those that take part in every frame: the picture's, others, and those that prompts name."""
        own = [LoraEntry(path=self.lora, weight=1.0, blocks={}, rank=None)] if self.lora else []
        return (*own, *self.loras, *self.prompt_loras())
