"""Restyle pictures: SDEdit with style LoRAs, the edges held by a ControlNet for Canny.

    python style_transfer.py                                     # two mountains as ink drawings
    python style_transfer.py image=PICTURE.jpg prompt="an ink drawing of a lake" strength=0.7
    python style_transfer.py start_from=inversion guidance_scale=1    # from each picture's own noise
    python style_transfer.py image=FOLDER grid.strength=[0.4,0.6,0.8] grid.weight=[0,0.5,1]
    python style_transfer.py cfg/sd15/style_transfer.json        # Stable Diffusion 1.5, on a GPU

Two knobs work against each other: `strength`, how much of the picture's colours and textures is given up, and
`controlnet_conditioning_scale`, how much of its geometry is kept. Where the style does not appear, raise the
first; where the scene is lost, the second. Reads a base, LoRA files, a ControlNet and pictures. Writes to
<output_dir>/<name>/: edges, numbered PNGs that carry their config, sheet.png, report.json, and index.html
to look at.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.ground.process import run_guarded
from lorakit.pictures.images import read_picture, save_png
from lorakit.sampling.config import check_size, shape_of
from lorakit.sampling.forecast import describe_sampling
from lorakit.sampling.gallery import Gallery, fill_folder
from lorakit.sampling.prompts import prompt_notes
from lorakit.sampling.recipe import parse_sampling
from lorakit.sampling.style_plan import (
    CONTROL,
    StyleConfig,
    controlnet_of,
    controlnet_parameters,
    find_captions,
    find_pictures,
    notes_of,
    path_lines,
    with_caption,
)
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorakit.diffusion.models import Base

DEFINITIONS = {
    "edge_f1": "harmonic mean of precision and recall of the result's edges against the input's, to a pixel",
    "colour_shift": "how far a channel's values moved in distribution, 0 to 255 (Wasserstein-1, mean)",
    "seconds": "for one picture of its batch",
}


@dataclass(frozen=True)
class Source:
    """A picture as it is restyled, and its edges: `edges` (H, W) bool, `hint` the same in black and white."""

    picture: "Image"
    edges: Any
    hint: "Image"


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


def compared(cfg: StyleConfig, source: Source, image: "Image") -> dict[str, float]:
    """What the report says of a result, see DEFINITIONS."""
    from lorakit.pictures.edges import edge_f1

    return {
        "edge_f1": round(edge_f1(source.edges, find_edges(cfg, image)), 4),
        "colour_shift": round(colour_shift(source.picture, image), 2),
    }


def colour_shift(a: "Image", b: "Image") -> float:
    """How far the distribution of the values moved, 0 to 255: Wasserstein-1, mean of the channels."""
    import numpy as np

    values = [np.sort(np.asarray(image, np.float32).reshape(-1, 3), axis=0) for image in (a, b)]
    return float(np.abs(values[0] - values[1]).mean())


def with_colours(image: "Image", source: "Image") -> "Image":
    """The colours of `source` on the brightness of `image`, by Y and by Cb and Cr of JPEG."""
    from PIL import Image

    brightness = image.convert("YCbCr").getchannel(0)
    _, *colours = source.convert("YCbCr").split()
    return Image.merge("YCbCr", [brightness, *colours]).convert("RGB")


def read_captions(cfg: StyleConfig, base: "Base", paths: list[str], sources: list[Source]) -> list[str]:
    """The caption of each picture, of the base's own words where it is to say them."""
    from lorakit.sampling.base_words import told_by_base

    captions, _ = find_captions(cfg, base.info, paths)
    vocabulary = read_vocabulary(base.info)
    found = []
    for path, source, caption in zip(paths, sources, captions, strict=True):
        if caption is None:
            assert vocabulary  # or nothing would have been left to it
            caption = told_by_base(base, source.picture, vocabulary)
            print(f"caption     {path}: “{caption}”, of the words of {base.info.name}", flush=True)
        found.append(caption)
    return found


def restyle_all(cfg: StyleConfig, info: BaseInfo, paths: list[str], folder: Path) -> list[Path]:
    """Make the pictures; returns the paths of the sheets."""
    from lorakit.diffusion.models import open_base
    from lorakit.sampling import restyling
    from lorakit.sampling.grid import Batch, fill
    from lorakit.sampling.own_path import OwnPaths
    from lorakit.sampling.page import write_page

    started = time.perf_counter()
    base = open_base(info, cfg.mixed_precision, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    check_size(cfg, base.info)  # again, for a base that was not on this machine
    name = controlnet_of(cfg, base.info)
    controlnet = restyling.load_controlnet(name, base) if name else None
    sources = [read_source(cfg, path, shape_of(cfg, base.info, path)) for path in paths]
    captions = read_captions(cfg, base, paths, sources)
    pictures, hints = [source.picture for source in sources], [source.hint for source in sources]
    own = OwnPaths(base, controlnet, cfg, paths, pictures, hints)

    def anew(batch: Batch) -> list["Image"]:
        cell = batch.cfg
        _, steps, guidance_scale = cell.sampler()
        return restyling.restyle(
            base,
            controlnet,
            batch.scheduler,
            [pictures[number] for number in batch.subjects],
            [hints[number] for number in batch.subjects],
            batch.prompt_embeds,
            batch.negative_embeds,
            seeds=batch.seeds,
            strength=cell.strength,
            steps=steps,
            guidance_scale=guidance_scale,
            control={key: getattr(cell, key) for key in CONTROL},
        )

    def render(batch: Batch) -> list["Image"]:
        images = (anew if batch.cfg.start_from == "noise" else own.restyle)(batch)
        if batch.cfg.colour == "style":
            return images
        return [with_colours(i, pictures[n]) for i, n in zip(images, batch.subjects, strict=True)]

    def alone(cell: StyleConfig, subject: int, seed: int) -> StyleConfig:
        return cell.model_copy(update={"image": paths[subject], "seed": seed, "images_per_picture": 1})

    leads = [[("input", source.picture), ("edges", source.hint)] for source in sources]
    gallery = Gallery(folder, cfg, [Path(path).name for path in paths], leads)
    fill(
        gallery,
        base,
        cfg,
        cfg.images_per_picture,
        asked=lambda cell: [with_caption(cell, caption) for caption in captions],
        render=render,
        alone=alone,
        facts=lambda cell, subject, image: compared(cell, sources[subject], image),
        shape=lambda subject: sources[subject].picture.size,
    )
    for number, source in enumerate(sources):
        save_png(source.hint, folder / (f"edges_{number:03d}.png" if len(sources) > 1 else "edges.png"))
    seconds = round(time.perf_counter() - started, 2)
    report = {"seconds": seconds, "device": str(base.device), "controlnet": name, "definitions": DEFINITIONS}
    sheets = gallery.finish(report)
    write_page(gallery, report)
    return sheets


def main(argv: list[str]) -> int:
    command = parse_sampling(
        StyleConfig,
        argv,
        prog="style_transfer.py",
        description="Restyle pictures with LoRAs, their edges held by a ControlNet.",
        default_config="cfg/style_transfer/ink.json",
    )
    cfg = command.config
    info = inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    check_size(cfg, info)
    paths = find_pictures(cfg.image)
    captions, told = find_captions(cfg, info, paths)
    cells = [with_caption(cell, text or "") for _, cell in cfg.numbered_cells() for text in captions]
    notes = [*notes_of(cfg, info, paths), *told]
    if "check" in command.flags:  # a run says it where it comes to them
        notes += prompt_notes(cells, info)
    count = len(cells) * cfg.images_per_picture
    return fill_folder(
        command,
        lambda folder: restyle_all(cfg, info, paths, folder),
        what=f"{count} of {len(paths)} with {info.name}",
        notes=notes,
        forecast=lambda: [
            *describe_sampling(
                cells,
                info,
                [shape_of(cfg, info, path) for path in paths],
                cfg.images_per_picture,
                controlnet_parameters(cfg, info),
            ),
            *path_lines(cells),
        ],
        files=f"{count} pictures, edges, report.json",
    )


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
