r"""Draw a data set for LoRAs: landscapes in one style or in those of the base, captions in metadata.jsonl.

    python miniature/draw_style.py                                # dataset/ink, as it is in the repository
    python miniature/draw_style.py style="pixel art" folder=dataset/pixel_art pictures=32
    python miniature/draw_style.py style="of the base" folder=dataset/landscapes pictures=144 seed=2 \
        jpeg_quality=92                                           # dataset/landscapes, likewise

The scenes are those of no other table: neither the base nor the judge ever sees them.
"""

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.command import parse_command
from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import make_folder, publish_file
from lorakit.ground.randomness import derive_seed
from lorakit.pictures.images import save_png
from miniature.landscapes import BASE_STYLES, Scene, render


class StyleSetConfig(Config):
    """The keys of a data set."""

    style: Literal[
        "a photo",
        "a flat poster",
        "a watercolor",
        "an ink drawing",
        "pixel art",
        "a stained glass window",
        "of the base",
    ] = Field(
        "an ink drawing",
        description="how the pictures are drawn, and how captions begin; of the base: its three by turns",
    )
    folder: str = Field("dataset/ink", min_length=1, description="where they go")
    pictures: int = Field(40, ge=1, le=10_000, description="how many")
    size: int = Field(128, ge=32, multiple_of=32, description="pixels of a side")
    seed: int = Field(0, ge=0, lt=2**63, description="every scene follows from it")
    jpeg_quality: int | None = Field(None, ge=1, le=100, description="null: PNG")


def style_scene(index: int, seed: int = 0) -> Scene:
    """Scene `index` of the data sets of this seed, the same in every style."""
    return Scene.sample(derive_seed(seed, "style set", index))


def main(argv: list[str]) -> int:
    command = parse_command(
        StyleSetConfig, argv, prog="draw_style.py", description="Draw landscapes with captions."
    )
    cfg = command.config
    styles = BASE_STYLES if cfg.style == "of the base" else (cfg.style,)
    folder = Path(cfg.folder)
    if "check" in command.flags:
        return 0
    if (folder / "metadata.jsonl").exists():
        raise UserError(f"{folder} holds a data set: remove it, or choose another folder")
    make_folder(folder)
    lines = []
    for index in range(cfg.pictures):
        scene, style = style_scene(index, cfg.seed), styles[index % len(styles)]
        image, name = render(scene, style, cfg.size), f"{index:03d}.{'jpg' if cfg.jpeg_quality else 'png'}"
        if cfg.jpeg_quality:
            image.save(folder / name, quality=cfg.jpeg_quality, subsampling=0)
        else:
            save_png(image, folder / name)
        lines.append(json.dumps({"file_name": name, "text": scene.caption(style)}))
    publish_file(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    print(f"wrote       {folder}: {cfg.pictures} pictures, metadata.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
