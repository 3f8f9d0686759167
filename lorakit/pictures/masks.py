"""Masks that weight the loss of a picture: white is trained, black is not. No torch here.

A mask lies beside its picture as `NAME-masklabel.png`, as OneTrainer writes it, or is the picture's alpha.
"""

from typing import Any, Literal

import numpy as np
from PIL import Image

from lorakit.pictures.folder import Row
from lorakit.pictures.images import load_image
from lorakit.pictures.views import View, entry_key

MaskKind = Literal["beside", "alpha"]


def mask_entry(view: View, kind: MaskKind, factor: int) -> bytes:
    """The name under which the weights of a view are cached."""
    source = view.row.sha256 if kind == "alpha" else view.row.mask_sha256
    return entry_key("mask", kind, source, view.shape, view.offset, view.flip, factor)


def mask_weights(view: View, kind: MaskKind, factor: int, **options: Any) -> np.ndarray:
    """(1, h, w) in [0, 1]: the mask as the view shows it, averaged over latent pixels; ones without a mask.

    Args:
        factor: pixels to a latent pixel.
        options: of load_image.
    """
    width, height = view.shape
    mask = _mask(view.row, kind, options)
    if mask is None:
        return np.ones((1, height // factor, width // factor), dtype=np.float32)
    pixels = (view.pixels(mask)[:1] + 1) / 2  # (1, H, W)
    cells = pixels.reshape(1, height // factor, factor, width // factor, factor)
    return np.ascontiguousarray(cells.mean(axis=(2, 4)), dtype=np.float32)  # (1, h, w)


def _mask(row: Row, kind: MaskKind, options: dict[str, Any]) -> Image.Image | None:
    """The mask as a grey RGB picture of the picture's size."""
    if kind == "beside":
        if row.mask is None:
            return None
        return load_image(row.mask, **options).convert("L").convert("RGB").resize((row.width, row.height))
    # What shines through on white and not on black is what alpha leaves of the ground.
    white, black = (
        np.asarray(
            load_image(row.source, name=row.name, background=(level, level, level), **options), dtype=np.int16
        )
        for level in (255, 0)
    )
    return Image.fromarray((255 - (white - black)).clip(0, 255).astype(np.uint8))
