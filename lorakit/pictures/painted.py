"""Masks that a user painted on a picture: a file, or what the page of drag.py saves. No torch here."""

import base64
import binascii

import numpy as np
from PIL import Image

from lorakit.ground.errors import UserError
from lorakit.pictures.images import crop, image_size, load_image, resize_to_cover

EMBEDDED = "data:image/png;base64,"


def read_mask(mask: str, image: str, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 in [0, 1], seen as the picture is.

    Args:
        mask, image: as `load_mask`.
        shape: (width, height) at which `image` is seen.

    Raises:
        UserError: as `load_mask`.
    """
    # By area: what no white pixel touches stays black.
    seen = crop(resize_to_cover(load_mask(mask, image), *shape, Image.Resampling.BOX), *shape)
    found = np.asarray(seen, np.float32) / 255
    if not found.any():
        _, name = _source(mask)
        raise UserError(f"{name}: is black all over, so that nothing may change; paint white where it may")
    return found


def load_mask(mask: str, image: str) -> Image.Image:
    """The mask in grey, of the size of the picture.

    Args:
        mask: path of a picture, or a PNG after EMBEDDED.
        image: path of the picture that it was painted on.

    Raises:
        UserError: no picture, or of another size than `image`.
    """
    source, name = _source(mask)
    size, wanted = image_size(source, name=name), image_size(image)
    if size != wanted:
        raise UserError(
            f"{name}: is {size[0]}x{size[1]}, and {image} is {wanted[0]}x{wanted[1]}: paint it on that "
            "picture, white where it may change"
        )
    return load_image(source, name=name).convert("L")


def _source(mask: str) -> tuple[str | bytes, str]:
    """What `load_image` reads, and how messages call it. Raises UserError: an embedded one is not whole."""
    if not mask.startswith(EMBEDDED):
        return mask, f"mask {mask}"
    try:
        return base64.b64decode(mask.removeprefix(EMBEDDED), validate=True), "mask in the config"
    except binascii.Error as error:
        raise UserError(f"mask in the config: is not whole ({error}); save it from the page anew") from error
