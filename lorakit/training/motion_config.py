"""The settings of motion: an adapter, and the clips that a LoRA on it learns from. No torch here."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.motion.camera import Pose, path
from lorakit.motion.config import Camera
from lorakit.pictures.clips import read_clips
from lorakit.pictures.folder import Table
from lorakit.pictures.views import Shape
from lorakit.training.clips import Clip, check_stills, film_clips, still_clips
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import file_sha256
from lorakit.weights.lora_file import is_motion
from lorakit.weights.motion_adapter import MotionInfo, inspect_motion_adapter, with_betas


# fmt: off
class MotionSettings(Config):
    """What moves: a camera over still pictures, or clips of one's own."""

    motion_adapter: str = Field(min_length=1, description="the motion adapter that the LoRA is for, as of animate.py: diffusers' folder or one file of AnimateDiff's (.safetensors)")
    camera: Camera | tuple[Camera, ...] | None = Field(None, description="what a camera does over the pictures of data_dir, with animate.py's keys: pan, tilt, zoom, roll, easing; a list: each picture is shown with each")
    clips_dir: str | None = Field(None, min_length=1, description="instead of camera and data_dir: folder of clips (folders of frames, GIF, WebP, MP4) with captions as of pictures")
    frames: int = Field(16, ge=2, description="frames of a clip")
    frame_stride: int = Field(1, ge=1, description="every which frame of clips_dir counts")
    takes: int = Field(4, ge=1, description="clips of each picture and camera that differ in where it starts, or of each clip of clips_dir in when; all are cached")
    enlarge: float = Field(1.0, ge=1, le=4, description="how much a picture may be enlarged so that the camera has room in it; 1: not at all, and smaller ones are refused")
    carried: float = Field(0.0, ge=0, le=1, description="share of samples whose noise lies in the scene and is seen through the camera, by half of it or more, as films of animate.py begin; the others' noise is each frame's own")
    most_weight: float = Field(5.0, ge=1, description="of the loss where there is much noise, which is where motion is decided: (SNR + 1) / SNR up to this; 1: all noise alike")
    beta_schedule: Literal["linear", "scaled_linear"] | None = Field(None, description="noise schedule; linear: as AnimateDiff's adapters were trained; null: the base's")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.camera is None) == (self.clips_dir is None):
            raise ValueError("camera, clips_dir: set exactly one of the two: a camera over pictures of data_dir, or clips")
        if self.camera == ():
            raise ValueError("camera: the list is empty")
        for camera in self.cameras():
            if all(len(set(keys)) == 1 for keys in camera.keys().values()):
                raise ValueError("camera: one is at rest; say what moves, such as zoom 1.35")
        if self.camera is not None and self.frame_stride != 1:
            raise ValueError("frame_stride, camera: frames are left out of clips alone; a faster camera goes further")
        if self.clips_dir is not None and self.carried:
            raise ValueError("carried, clips_dir: what the camera of a clip did is not known, so that no noise can be seen through it")
        return self

    def cameras(self) -> tuple[Camera, ...]:
        return (self.camera,) if isinstance(self.camera, Camera) else self.camera or ()


# What must not be set beside motion, and why.
EXCLUDED = (
    ("random_flip", "would turn the way that a camera pans"),
    ("masked_loss", "weights one picture"),
    ("train_text_encoder", "learns words, which do not move"),
    ("snr_gamma", "weights the loss where there is little noise; motion.most_weight weights it"),
    ("enable_xformers_memory_efficient_attention", "has no kernel for so many and so short rows"),
)


def check_motion_settings(cfg: Any) -> None:
    """Refuse keys that do not go with motion, or need it.

    Raises:
        ValueError: names the keys.
    """
    targets = cfg.target_modules
    if cfg.motion is None:
        if targets == "temporal":
            raise ValueError('target_modules, objective: "temporal" is of a motion adapter; set objective to "motion"')
        return
    if targets != "temporal" and (isinstance(targets, str) or not all(is_motion(f".{end}.") for end in targets)):
        raise ValueError('objective, target_modules: "motion" leaves the layers of the base alone; set target_modules to "temporal"')
    if cfg.save_format != "diffusers":
        raise ValueError('objective, save_format: names of motion layers in kohya\'s layout are read by no other program; set save_format to "diffusers"')
    if cfg.crop != "center":
        raise ValueError("objective, crop: where the camera looks is said by motion.takes; leave crop out")
    if cfg.motion.clips_dir and (cfg.data_dir or cfg.dataset_name):
        raise ValueError("motion.clips_dir, data_dir, dataset_name: clips or pictures; leave the others out")
# fmt: on


def with_motion(cfg: Any, base: BaseInfo) -> tuple[BaseInfo, MotionInfo | None]:
    """The base with the noise schedule of a config, and its adapter; raises as `adapter_of`."""
    if cfg.motion is None:
        return base, None
    return with_betas(base, cfg.motion.beta_schedule), adapter_of(cfg, base)


def adapter_of(cfg: Any, base: BaseInfo) -> MotionInfo | None:
    """The motion adapter of a config; None without one.

    Raises:
        UserError: BaseError of another base; fewer positions than frames.
    """
    if cfg.motion is None:
        return None
    info = inspect_motion_adapter(cfg.motion.motion_adapter, base)
    if cfg.motion.frames > info.positions:
        raise UserError(
            f"motion.frames {cfg.motion.frames}: {info.name} has {info.positions} positions; lower it"
        )
    return info


def read_films(cfg: Any, folder: str, **options: Any) -> Table:
    """The checked clips of a folder; `options` are folder.read_folder's."""
    for key in ("broken_images", "masks", "remember_in"):
        del options[key]
    return read_clips(folder, frames=cfg.motion.frames, stride=cfg.motion.frame_stride, **options)


def paths_of(cfg: Any, shape: Shape) -> list[list[Pose]]:
    """The way of each camera over pictures trained at a shape."""
    frames = cfg.motion.frames
    return [path(frames, shape, each.keys(), each.easing, False) for each in cfg.motion.cameras()]


def check_room(cfg: Any, plan: Any) -> None:
    """Raises DataError where cameras do not find room in the pictures of a plan."""
    if cfg.motion is None or cfg.motion.camera is None:
        return
    for where, table, shapes in (
        (cfg.data_dir or cfg.dataset_name, plan.table, plan.shapes),
        (cfg.validation_data_dir, plan.validation, plan.validation_shapes),
    ):
        paths = [paths_of(cfg, shape) for shape in shapes]
        check_stills(where, table.rows if table else (), shapes, paths, cfg.motion.enlarge)


def clips_of(cfg: Any, table: Table, shapes: Sequence[Shape]) -> list[list[Clip]]:
    """The clips of each row, the one that is validated first."""
    settings, found = cfg.motion, []
    for row, shape in zip(table.rows, shapes, strict=True):
        if settings.clips_dir:
            clips = film_clips(row, shape, settings.frames, settings.frame_stride, settings.takes)
        else:
            clips = still_clips(row, shape, paths_of(cfg, shape), settings.takes, settings.enlarge)
        found.append([*clips])
    return found


def motion_record(cfg: Any, adapter: MotionInfo | None) -> Any:
    """What a run's motion depends on, wherever its files lie; None without."""
    if cfg.motion is None:
        return None
    own = cfg.motion.model_dump(mode="json", exclude={"motion_adapter", "clips_dir"})
    files = dict.fromkeys(str(place.path) for place in adapter.places.values()) if adapter else {}
    return [own, [file_sha256(file) for file in files]]
