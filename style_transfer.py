"""Restyle pictures: SDEdit with style LoRAs, the edges held by a ControlNet for Canny.

    python style_transfer.py                                     # two mountains as ink drawings
    python style_transfer.py image=PICTURE.jpg prompt="an ink drawing of a lake" strength=0.7
    python style_transfer.py image=FOLDER grid.strength=[0.4,0.6,0.8] grid.weight=[0,0.5,1]
    python style_transfer.py cfg/sd15/style_transfer.json        # Stable Diffusion 1.5, on a GPU

Two knobs work against each other: `strength`, how much of the picture's colours and textures is given up, and
`controlnet_conditioning_scale`, how much of its geometry is kept. Where the style does not appear, raise the
first; where the scene is lost, the second. Reads a base, LoRA files, a ControlNet and pictures. Writes to
<output_dir>/<name>/: edges, numbered PNGs that carry their config, sheet.png, report.json.
"""

import glob
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import parse_command
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.pictures.images import IMAGE_SUFFIXES, image_size, read_picture, save_png
from lorakit.pictures.views import assign_shapes
from lorakit.sampling.config import SamplingConfig, check_size, repeated
from lorakit.sampling.gallery import Gallery, claim_folder
from lorakit.weights.base import BaseInfo, inspect_base

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
DEFINITIONS = {
    "edge_f1": "harmonic mean of precision and recall of the result's edges against the input's, to a pixel",
    "colour_shift": "how far a channel's values moved in distribution, 0 to 255 (Wasserstein-1, mean)",
    "seconds": "for one picture of its batch",
}
Threshold = Literal["auto"] | Annotated[float, Field(ge=0, le=2040)]


# fmt: off
class StyleConfig(SamplingConfig):
    """The keys of a config of style_transfer.py."""

    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"image": "Pictures", "strength": "Restyling", "controlnet": "Edges"}

    image: str = Field(min_length=1, description="a picture, a folder of pictures, or a pattern such as photos/*.jpg")
    prompt: str = Field("", description="what the result shows, with the words of the style LoRA")
    images_per_picture: int = Field(1, ge=1, le=1000, description="results for each picture")

    strength: float = Field(0.6, gt=0, le=1, description="how far towards noise the picture is taken, and the share of the steps that is run; 1: its colours are forgotten")

    controlnet: str | None = Field("auto", min_length=1, description="folder or hub id of a ControlNet for Canny edges; auto: the base's own folder controlnet, if there is one; null: none, plain SDEdit")
    controlnet_conditioning_scale: float = Field(0.7, ge=0, le=2, description="how firmly the edges are held")
    control_guidance_start: float = Field(0.0, ge=0, le=1, description="share of the steps after which they begin to be")
    control_guidance_end: float = Field(1.0, ge=0, le=1, description="share after which they are no longer; 0.6 to 0.8 lets lines be restyled")
    canny_low: Threshold = Field("auto", description="Canny's lower threshold in OpenCV's units, where 100 is usual; auto: 0.4 of the upper one")
    canny_high: Threshold = Field("auto", description="upper threshold, where 200 is usual; auto: by the picture's own contrast")
    canny_blur: float = Field(1.0, ge=0, le=20, description="standard deviation of the blur before it, pixels; 0: none, as in OpenCV")

    axes: ClassVar[tuple[str, ...]] = (*SamplingConfig.axes, "prompt", "strength", *CONTROL)

    @model_validator(mode="after")
    def _agree(self):
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError("control_guidance_start, control_guidance_end: the first must be the smaller one")
        if self.canny_low != "auto" and self.canny_high != "auto" and self.canny_low > self.canny_high:
            raise ValueError("canny_low, canny_high: the first must not be above the second")
        return self
# fmt: on


@dataclass(frozen=True)
class Source:
    """A picture as it is restyled, and its edges: `edges` (H, W) bool, `hint` the same in black and white."""

    picture: "Image"
    edges: Any
    hint: "Image"


def find_pictures(pattern: str) -> list[str]:
    """The pictures that `image` names, sorted.

    Raises:
        UserError: none.
    """
    path = Path(pattern)
    if path.is_file():
        return [pattern]
    names = [str(each) for each in path.iterdir()] if path.is_dir() else glob.glob(pattern, recursive=True)
    found = sorted(n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and Path(n).is_file())
    if not found:
        what = "holds no picture" if path.is_dir() else "no such picture, folder or match"
        raise UserError(f"image {pattern}: {what}; name a picture, a folder of them, or a pattern")
    return found


def shape_of(cfg: StyleConfig, info: BaseInfo, path: str) -> tuple[int, int]:
    """Width and height at which a picture is restyled."""
    if cfg.width and cfg.height:
        return cfg.width, cfg.height
    return assign_shapes([image_size(path)], info.resolution, info.size_multiple, True)[0]


def find_edges(cfg: StyleConfig, picture: "Image") -> Any:
    """(H, W) bool, by the thresholds of the config."""
    from lorakit.pictures.edges import OPENCV_UNIT, as_floats, auto_thresholds, canny

    values = as_floats(picture)
    high = cfg.canny_high
    high = auto_thresholds(values, cfg.canny_blur)[1] if high == "auto" else high * OPENCV_UNIT
    low = 0.4 * high if cfg.canny_low == "auto" else min(cfg.canny_low * OPENCV_UNIT, high)
    return canny(values, cfg.canny_blur, low, high)


def read_source(cfg: StyleConfig, path: str, shape: tuple[int, int]) -> Source:
    """The picture at its working size, where its edges are looked for."""
    from lorakit.pictures.edges import edge_image

    picture = read_picture(path, shape)
    edges = find_edges(cfg, picture)
    return Source(picture, edges, edge_image(edges))


def controlnet_of(cfg: StyleConfig, info: BaseInfo) -> str | None:
    """The ControlNet that `auto` stands for, or the one that is named."""
    if cfg.controlnet != "auto":
        return cfg.controlnet
    own = Path(cfg.pretrained_model_name_or_path) / "controlnet"
    return str(own) if own.is_dir() else None


def colour_shift(a: "Image", b: "Image") -> float:
    """How far the distribution of the values moved, 0 to 255: Wasserstein-1, mean of the channels."""
    import numpy as np

    values = [np.sort(np.asarray(image, np.float32).reshape(-1, 3), axis=0) for image in (a, b)]
    return float(np.abs(values[0] - values[1]).mean())


def restyle_all(cfg: StyleConfig, info: BaseInfo, paths: list[str], folder: Path) -> list[Path]:
    """Make the pictures; returns the paths of the sheets."""
    from lorakit.diffusion.models import open_base
    from lorakit.pictures.edges import edge_f1
    from lorakit.sampling import restyling
    from lorakit.sampling.grid import Batch, fill

    started = time.perf_counter()
    base = open_base(info, cfg.mixed_precision, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    check_size(cfg, base.info)  # again, for a base that was not on this machine
    name = controlnet_of(cfg, base.info)
    controlnet = restyling.load_controlnet(name, base) if name else None
    sources = [read_source(cfg, path, shape_of(cfg, base.info, path)) for path in paths]

    def render(batch: Batch) -> list["Image"]:
        cell = batch.cfg
        _, steps, guidance_scale = cell.sampler()
        return restyling.restyle(
            base,
            controlnet,
            batch.scheduler,
            [sources[number].picture for number in batch.subjects],
            [sources[number].hint for number in batch.subjects],
            batch.prompt_embeds,
            batch.negative_embeds,
            seeds=batch.seeds,
            strength=cell.strength,
            steps=steps,
            guidance_scale=guidance_scale,
            control={key: getattr(cell, key) for key in CONTROL},
        )

    def facts(cell: StyleConfig, subject: int, image: "Image") -> dict[str, float]:
        source = sources[subject]
        return {
            "edge_f1": round(edge_f1(source.edges, find_edges(cfg, image)), 4),
            "colour_shift": round(colour_shift(source.picture, image), 2),
        }

    def alone(cell: StyleConfig, subject: int, seed: int) -> StyleConfig:
        return cell.model_copy(update={"image": paths[subject], "seed": seed, "images_per_picture": 1})

    leads = [[("input", source.picture), ("edges", source.hint)] for source in sources]
    gallery = Gallery(folder, cfg, [Path(path).name for path in paths], leads)
    fill(
        gallery,
        base,
        cfg,
        cfg.images_per_picture,
        prompts=lambda cell: [cell.prompt] * len(paths),
        render=render,
        alone=alone,
        facts=facts,
        shape=lambda subject: sources[subject].picture.size,
    )
    for number, source in enumerate(sources):
        save_png(source.hint, folder / (f"edges_{number:03d}.png" if len(sources) > 1 else "edges.png"))
    report = {
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(base.device),
        "controlnet": name,
    }
    return gallery.finish(report | {"definitions": DEFINITIONS})


def notes_of(cfg: StyleConfig, info: BaseInfo, paths: list[str]) -> list[str]:
    """What a user should know before the work begins.

    Raises:
        UserError: steps that would not be any.
    """
    notes = []
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
    if cfg.controlnet == "auto" and controlnet_of(cfg, info) is None:
        notes.append(f"{info.name} has no ControlNet: plain SDEdit, so that strength alone keeps the scene")
    return list(dict.fromkeys(notes))


def main(argv: list[str]) -> int:
    argv, again = repeated(StyleConfig, argv)
    command = parse_command(
        StyleConfig,
        argv,
        prog="style_transfer.py",
        description="Restyle pictures with LoRAs, their edges held by a ControlNet.",
        default_config=None if again else "cfg/style_transfer/ink.json",
        epilog="`--from PICTURE.png` takes the settings of a picture that this script made; settings after it "
        "change them.",
    )
    cfg = command.config
    info = inspect_base(cfg.pretrained_model_name_or_path)
    check_size(cfg, info)
    paths = find_pictures(cfg.image)
    notes = notes_of(cfg, info, paths)
    count = len(cfg.numbered_cells()) * len(paths) * cfg.images_per_picture
    print(f"pictures    {count} of {len(paths)} with {info.name}", flush=True)
    print("".join(f"note        {note}\n" for note in notes), end="", flush=True)
    if "check" in command.flags:
        return 0
    folder = claim_folder(cfg)
    sheets = restyle_all(cfg, info, paths, folder)
    print(f"wrote       {folder}: {count} pictures, edges, report.json; look at {sheets[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
