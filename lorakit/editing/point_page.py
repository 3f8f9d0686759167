"""The page to point with: handles, targets and a mask on a picture, saved as drag.json. No torch here."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.editing.drag_config import DragConfig
from lorakit.editing.drag_plan import View
from lorakit.ground.publish import publish_file
from lorakit.pictures.images import image_size, load_image
from lorakit.pictures.page import command, data_uri, page, setting, shell, webp
from lorakit.pictures.painted import load_mask
from lorakit.sampling.config import shape_of
from lorakit.weights.base import inspect_base

SIDE = 768
"""Pixels of the longer side of the picture in the page."""


def write_point_page(cfg: DragConfig) -> Path:
    """Write <output_dir>/<name of the picture>_drag.html; returns its path.

    Raises:
        UserError: no picture, no base, or a mask that is none.
        OutputError: it cannot be written.
    """
    path = Path(cfg.output_dir) / f"{Path(cfg.image).stem}_drag.html"
    publish_file(path, point_page(cfg).encode())
    return path


def point_page(cfg: DragConfig) -> str:
    """The page, with the points and the mask of the config to begin with."""
    base = inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    view = View(image_size(cfg.image), shape_of(cfg, base, cfg.image))
    asked = cfg.model_dump(mode="json", exclude_unset=True, exclude={"points", "mask"})
    config: dict[str, Any] = asked | {"image": cfg.image, "prompt": cfg.prompt}
    data = {
        "picture": data_uri(webp(load_image(cfg.image), SIDE)),
        "size": view.size,
        "seen": [*view.own((0, 0)), *view.own(view.shape)],
        "config": config | {"kind": cfg.kind, "radius": cfg.radius},
        "points": cfg.points,
        "mask": data_uri(_png(load_mask(cfg.mask, cfg.image))) if cfg.mask else None,
    }
    words = [setting("image", cfg.image), setting("mask", "mask.png"), setting("prompt", cfg.prompt or "…")]
    texts = {
        "drag": command("python drag.py drag.json"),
        "edit": command(shell(["python", "edit.py", *words, setting("target_prompt", "…"), "lora=null"])),
    }
    width, height = view.size
    return page(
        Path(__file__).with_suffix(""),
        f"Drag {Path(cfg.image).name}",
        f"{width}x{height} pixels, seen by {base.name} at {view.shape[0]}x{view.shape[1]}",
        texts,
        data,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
