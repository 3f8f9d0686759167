"""Mountain landscapes with captions and known attributes, drawn from a seed in any of six styles.

    from miniature.landscapes import Scene, render
    scene = Scene.sample(7, time="sunset")
    render(scene, "a photo", size=256).save("sunset.png")
    scene.caption("a photo")        # "a photo of snowy mountains at sunset with a lake"

A scene is laid out once (view.py: height fields of mountains, ground, sky) and painted by one function per
style. Every part draws from a random stream of its own, so that a seed keeps its ridges when the style, the
hour or what stands in front of them changes.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from miniature.fields import Array
from miniature.photo import paint_photo
from miniature.prints import paint_pixel_art, paint_poster, paint_stained_glass
from miniature.scene import (
    BASE_STYLES,
    FOREGROUNDS,
    HELD_OUT_STYLES,
    LAYERS,
    MOUNTAINS,
    STYLES,
    TIMES,
    Scene,
    held_out,
    parse_caption,
)
from miniature.view import View, lay_out
from miniature.washes import paint_ink, paint_watercolor

__all__ = [
    "BASE_STYLES",
    "FOREGROUNDS",
    "HELD_OUT_STYLES",
    "LAYERS",
    "MOUNTAINS",
    "STYLES",
    "TIMES",
    "Scene",
    "held_out",
    "lay_out",
    "parse_caption",
    "render",
]

PAINTERS: dict[str, Callable[[View], Array]] = {
    "a photo": paint_photo,
    "a flat poster": paint_poster,
    "a watercolor": paint_watercolor,
    "an ink drawing": paint_ink,
    "pixel art": paint_pixel_art,
    "a stained glass window": paint_stained_glass,
}


def render(scene: Scene, style: str, size: int = 128) -> Image.Image:
    """The scene as an RGB picture of size x size pixels, drawn at twice that and averaged.

    Raises:
        ValueError: the style is unknown, or the size no multiple of 32.
    """
    if style not in PAINTERS:
        raise ValueError(f"style must be one of {', '.join(PAINTERS)}, not {style!r}")
    if size < 32 or size % 32:
        raise ValueError(f"size must be a multiple of 32, not {size}")
    painted = PAINTERS[style](lay_out(scene, 2 * size))
    levels = np.rint(255 * np.clip(painted, 0, 1)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0))).resize(
        (size, size), Image.Resampling.BOX
    )
