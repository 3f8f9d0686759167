"""Pictures in and out: the one `load_image` of the toolkit, resizing, arrays, PSNR.

An image is a PIL RGB picture of 8 bits a channel; an array is float32 (3, H, W) in [-1, 1]. Imports no torch.
"""

import io
import math
import os
import secrets
import struct
import threading
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from lorakit.ground.errors import OutputError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SUPPORTED = "supported are PNG, JPEG, WebP, BMP, GIF, TIFF and AVIF"
MAX_PIXELS = 64_000_000  # 8000 x 8000
# A closed list: Pillow's other readers are rare, and one of them (EPS) starts an external program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_MAGIC = ((b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"RIFF", "WebP"))
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPAQUE_MODES = ("L", "RGB", "CMYK")
_open_lock = threading.Lock()


class ImageError(UserError):
    """A file that is not a usable picture; the message begins with its name."""


def load_image(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
    animated: Literal["error", "first"] = "error",
) -> Image.Image:
    """Decode a picture to RGB: upright, in sRGB, 16 bits scaled to 8, transparency laid on `background`.

    A picture with an alpha channel carries `info["transparent_share"]`, the share of its pixels with an
    alpha below one half; nothing else is left in `info`.

    Args:
        source: a path, or the bytes of the file.
        name: stands for the file in messages (default: the path).
        max_pixels: larger pictures are refused from the header, before anything is decoded.
        animated: "first" takes the first frame or page of several.

    Raises:
        ImageError: missing, broken, too large, animated or unsupported; says which and the remedy.
    """
    label = name or ("image" if isinstance(source, bytes) else str(source))
    with _open(source, label) as image:
        orientation = _checked_orientation(image, label, max_pixels, animated)
        try:
            image.load()
        except Exception as error:  # a decoder raises anything from OSError to struct.error on broken bytes
            raise ImageError(f"{label}: truncated or broken {image.format} ({error}); replace it") from error
        colour, alpha = _split_alpha(image, label)
        profile = image.info.get("icc_profile")
    rgb = _to_srgb(colour, profile)
    info: dict[str | tuple[int, int], object] = {}
    if alpha is not None:
        info["transparent_share"] = float((np.asarray(alpha) < 128).mean())
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    rgb.info = info
    return rgb


def image_size(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    animated: Literal["error", "first"] = "error",
) -> tuple[int, int]:
    """(width, height) that `load_image` would give, read from the header; refuses what the header shows."""
    label = name or ("image" if isinstance(source, bytes) else str(source))
    plain = _jpeg_size(source) if isinstance(source, bytes) else None
    if plain and plain[0] * plain[1] <= max_pixels:
        return plain
    with _open(source, label) as image:
        turned = _checked_orientation(image, label, max_pixels, animated) >= 5
        width, height = image.size
    return (height, width) if turned else (width, height)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that is neither turned nor one of several; None where Pillow is to look.

    Pillow takes ten times as long for a header, which is what most of a check of many pictures takes.
    """
    place, size = 2, None
    while data.startswith(b"\xff", place) and data.startswith(b"\xff\xd8"):
        kind, length = data[place + 1 : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        own = data[place + 4 : place + 2 + length]
        if len(own) != length - 2 or kind == b"\xda":  # cut short, or the pixels begin
            return size if len(own) == length - 2 else None
        if kind in (b"\xc0", b"\xc2") and size is None and length > 7:  # baseline, progressive
            height, width = int.from_bytes(own[1:3], "big"), int.from_bytes(own[3:5], "big")
            size = (width, height) if own[0] == 8 and own[5] in (1, 3) and width * height else None
            if size is None:
                return None
        elif kind not in (b"\xc4", b"\xdb", b"\xdd", b"\xe0", b"\xee", b"\xfe"):
            if kind != b"\xe2" or not own.startswith(b"ICC_PROFILE\0"):
                return None
        place += 2 + length
    return None


def resize_to_cover(
    image: Image.Image, width: int, height: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale to the smallest size that covers width x height, keeping the aspect ratio.

    One side comes out exact, the other at least as long as asked and rounded to whole pixels.
    """
    w, h = image.size
    if width * h >= height * w:
        size = width, round(h * width / w)
    else:
        size = round(w * height / h), height
    return image.resize(size, resample)


def crop(
    image: Image.Image, width: int, height: int, left: int | None = None, top: int | None = None
) -> Image.Image:
    """Cut width x height out of a picture that is at least as large; None centres that direction.

    Of an odd number of pixels too many the same one is cut as in training; see views.View.
    """
    left = round((image.width - width) / 2) if left is None else left
    top = round((image.height - height) / 2) if top is None else top
    inside = 0 <= left <= image.width - width and 0 <= top <= image.height - height
    assert inside, f"crop {width}x{height} at ({left}, {top}) leaves the picture of {image.size}"
    return image.crop((left, top, left + width, top + height))


def read_picture(path: str | Path, shape: tuple[int, int]) -> Image.Image:
    """The picture as a model sees it: scaled to cover (width, height) and cut in the middle."""
    return crop(resize_to_cover(load_image(path), *shape), *shape)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture -> float32 (3, H, W) in [-1, 1]."""
    assert image.mode == "RGB", f"an RGB picture is expected, not {image.mode}"
    pixels = np.asarray(image).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(127.5) - np.float32(1)


def from_array(array: np.ndarray) -> Image.Image:
    """(3, H, W) in [-1, 1], clipped and rounded half to even -> RGB picture; inverse of `to_array`."""
    assert array.ndim == 3 and array.shape[0] == 3, f"(3, H, W) is expected, not {array.shape}"
    assert np.isfinite(array).all(), "a picture with NaN or infinite values"
    levels = np.rint((array.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, 20 log10(255 / RMSE) over all RGB values; inf for equal pictures."""
    assert a.size == b.size, f"pictures of different sizes: {a.size} and {b.size}"
    difference = np.asarray(a.convert("RGB"), np.float64) - np.asarray(b.convert("RGB"), np.float64)
    mse = float((difference**2).mean())
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def save_png(image: Image.Image, path: str | Path, *, text: dict[str, str] | None = None) -> None:
    """Write a PNG with optional text chunks; a reader sees the old file or the new one, never a part.

    Raises:
        OutputError: the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    # In the same folder, for a rename is atomic only within one file system; "x" applies the umask.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            image.save(file, "PNG", pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: cannot write the picture: {reason}; check folder and free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _open(source: str | Path | bytes, label: str) -> Image.Image:
    """Read the header only."""
    try:
        # max_pixels replaces the warning. Its filter is global, so two threads must not set it at once.
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except Exception as error:  # header parsers raise anything, as decoders do
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = _looks_like(source)
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"{error}; make it smaller"
        else:
            reason = f"broken header ({error}); replace it; {SUPPORTED}"
        raise ImageError(f"{label}: {reason}") from error


def _looks_like(source: str | Path | bytes) -> str:
    """What a file is that Pillow does not recognise, with the remedy."""
    if isinstance(source, bytes):
        head = source[:1024]
    else:
        with open(source, "rb") as file:
            head = file.read(1024)
    if not head:
        return "the file is empty (0 bytes); replace it"
    if head.startswith(b"version https://git-lfs"):
        return "looks like a git-LFS pointer, not the picture itself: run `git lfs pull`"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return f"HEIC is not supported: convert it to PNG or JPEG ({SUPPORTED})"
    if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return f"JPEG XL is not supported: convert it to PNG ({SUPPORTED})"
    if b"<svg" in head:
        return f"SVG is a drawing, not pixels: export it as PNG ({SUPPORTED})"
    if b"<html" in head.lower():
        return "looks like a web page, so the download went wrong: download the picture again"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return f"begins like a {kind} but is truncated or broken; replace it"
    text = head.decode("utf-8", "replace")
    if all(character.isprintable() or character.isspace() for character in text):
        return f"looks like text, not a picture; {SUPPORTED}"
    return f"not a picture of a known type; {SUPPORTED}"


def _checked_orientation(image: Image.Image, label: str, max_pixels: int, animated: str) -> int:
    """EXIF orientation, 1 to 8, of a picture whose header raises no objection."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{label}: {width}x{height} is over {max_pixels:,} pixels; shrink it or allow more")
    if image.mode == "F":
        raise ImageError(f"{label}: floating-point pixels have no agreed range; save it with 8 or 16 bits")
    try:
        # MPO is a JPEG photo with a preview or a second view, not an animation.
        frames = animated == "error" and image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:
        raise ImageError(f"{label}: truncated or broken {image.format} ({error}); replace it") from error
    if frames:
        raise ImageError(f"{label}: has several frames or pages; save the one you want as a file of its own")
    # Pillow turns TIFF itself, header size included. In a PNG without early EXIF, getexif() would decode all
    # pixels to look for a late chunk, which browsers ignore as well.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1  # the pixels may be sound although the EXIF block is not
    return orientation if orientation in _TRANSPOSE else 1


def _split_alpha(image: Image.Image, label: str) -> tuple[Image.Image, Image.Image | None]:
    """(picture in L, RGB or CMYK, alpha in L or None)."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        opaque = (levels != image.info.get("transparency", -1)).astype(np.uint8) * 255
        return _grey_from_16_bit(levels, label), None if opaque.all() else Image.fromarray(opaque)
    try:
        if image.mode in ("P", "PA", "La", "RGBa") or "transparency" in image.info:
            plain = image.mode == "P" and "transparency" not in image.info
            image = image.convert("RGB" if plain else "RGBA")
        alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
        if image.mode not in _OPAQUE_MODES:
            image = image.convert("L" if image.mode == "LA" else "RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"{label}: {image.mode} pixels are not supported; save it as RGB") from error
    return image, alpha


def _grey_from_16_bit(levels: np.ndarray, label: str) -> Image.Image:
    """(H, W) integers -> L. Pillow's own conversion clips at 255 instead of scaling."""
    if levels.dtype.itemsize > 2 and not (levels.min() >= 0 and 255 < levels.max() <= 65535):
        raise ImageError(f"{label}: 32-bit grey up to {levels.max()} has no known scale; save it with 8 bits")
    return Image.fromarray((levels // 257).astype(np.uint8))  # floor(255 v / 65535)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB or CMYK -> RGB through the embedded ICC profile, or plainly where there is none that works."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
                assert converted is not None  # None comes only from inPlace=True
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
            pass  # a broken profile, or one of another mode, says nothing about the pixels
    return image.convert("RGB")
