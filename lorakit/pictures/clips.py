"""A folder of captioned clips -> a checked table: folders of frames, GIF, WebP and MP4. Imports no torch.

Frames in a folder go by their names, in which numbers count as numbers. A clip is named by its file, or by
its folder; its caption stands in metadata.jsonl or beside it, as a picture's does.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from lorakit.ground.errors import UserError
from lorakit.pictures.caption_rules import CaptionLines, MissingCaptions, with_captions
from lorakit.pictures.captions import DataError, Fault, FolderReader, Item
from lorakit.pictures.folder import Row, Table
from lorakit.pictures.images import IMAGE_SUFFIXES, ImageError, image_size, load_image

ANIMATED, VIDEO = (".gif", ".webp"), (".mp4",)
STILL = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in ANIMATED)
LONGEST = 2000
"""Frames of a clip: one caption does not hold for more."""


class _ClipReader(FolderReader):
    """Lists clips in place of pictures."""

    def __init__(self, root: Path, allow_symlinks: bool, extension: str):
        super().__init__(root, (*ANIMATED, *VIDEO), allow_symlinks, extension)
        stills = [PurePosixPath(name) for name in self.files if name.lower().endswith(STILL)]
        if loose := [path for path in stills if len(path.parts) == 1]:
            remedy = "put the frames of each clip into a folder of its own, or stills into data_dir"
            self.fault(str(loose[0]), "a still stands among the clips", remedy)
        self.images = sorted({*self.images, *(str(path.parent) for path in stills if len(path.parts) > 1)})

    def _is_there(self, name: str) -> bool:
        return os.path.exists(self.root / name)

    def _no_images(self) -> None:
        kinds = ", ".join((*ANIMATED, *VIDEO))
        self.fault(
            "", f"no clips here: no folders of frames, no {kinds}", "put clips there or correct the path"
        )


def read_clips(
    root: str | Path,
    *,
    frames: int,
    stride: int,
    caption_column: str | None,
    caption_extension: str,
    caption_lines: CaptionLines,
    missing_captions: MissingCaptions,
    allow_symlinks: bool,
    max_image_pixels: int,
    max_aspect: float,
) -> Table:
    """Read and check a folder of clips, each with `frames` frames at least of which every `stride`-th counts.

    Raises:
        DataError: lists every fault with its file.
        UserError: no codec for MP4 is here.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError([Fault(str(root), "no such folder", "give the folder that holds the clips")])
    reader = _ClipReader(root, allow_symlinks, caption_extension)
    found, source = reader.items(caption_column, missing_captions)
    prefix, faults, warnings = f"{root}/", reader.faults, reader.warnings
    items = with_captions(found, caption_lines, missing_captions, prefix, faults, warnings)
    needed = (frames - 1) * stride + 1
    if any(item.name.lower().endswith(VIDEO) for item in items):
        _check_codec(root)
    rows = []
    for item in items:
        try:
            row = _inspected(item, max_image_pixels)
        except ImageError as error:
            faults.append(Fault(prefix + item.name, str(error), "replace the clip or take it out"))
            continue
        label = prefix + item.name
        faults += _faults(label, row, needed, max_aspect)
        rows.append(row)
    if not rows and not faults:
        faults.append(Fault(str(root), "no clips are left", "add clips with captions"))
    if faults:
        raise DataError(faults)
    return Table(tuple(rows), tuple(warnings), source)


def _faults(label: str, row: Row, needed: int, max_aspect: float) -> list[Fault]:
    longer, shorter = max(row.width, row.height), min(row.width, row.height)
    if row.frames > LONGEST:
        return [Fault(label, f"has more than {LONGEST} frames", "cut it into clips, each with its caption")]
    if row.frames == 1:
        return [
            Fault(label, "has one frame, and nothing moves", "put stills into data_dir, with motion.camera")
        ]
    if row.frames < needed:
        remedy = f"lower motion.frames or motion.frame_stride, which need {needed} frames"
        return [Fault(label, f"has {row.frames} frames", remedy)]
    if longer > max_aspect * shorter:
        ratio = f"the sides are {longer / shorter:.2f} to 1, max_aspect is {max_aspect:g}"
        return [Fault(label, f"{row.width}x{row.height}: {ratio}", "crop it or raise max_aspect")]
    return []


def _inspected(item: Item, max_pixels: int) -> Row:
    assert isinstance(item.source, str)
    path = Path(item.source)
    digest = hashlib.sha256()
    for file in _stills(path) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    first, *others = sizes = list(islice(_sizes(path, max_pixels), LONGEST + 1))
    if other := next((size for size in others if size != first), None):
        shown = " and ".join(f"{width}x{height}" for width, height in (first, other))
        raise ImageError(f"its frames differ in size: {shown}")
    caption, *more = item.caption
    line, sha256 = item.line or item.name, digest.hexdigest()
    return Row(item.source, item.name, caption, *first, sha256, line, others=tuple(more), frames=len(sizes))


def _sizes(path: Path, max_pixels: int) -> Iterator[tuple[int, int]]:
    """Of every frame; a GIF or WebP has one for all."""
    if path.is_dir():
        yield from (image_size(still, max_pixels=max_pixels) for still in _stills(path))
    elif path.suffix.lower() in VIDEO:
        yield from (image.size for image in _video(path, max_pixels))
    else:
        size = image_size(path, max_pixels=max_pixels, animated="first")
        with Image.open(path) as image:
            yield from [size] * getattr(image, "n_frames", 1)


# ---- frames ----


def clip_frames(path: Path, start: int, number: int, stride: int, max_pixels: int) -> list[Image.Image]:
    """`number` frames from frame `start` on, RGB, what is transparent on white.

    Raises:
        ImageError: a frame is broken, or missing.
    """
    wanted = range(start, start + number * stride, stride)
    if path.is_dir():
        stills = _stills(path)
        return [load_image(stills[i], max_pixels=max_pixels) for i in wanted]
    frames = _video(path, max_pixels) if path.suffix.lower() in VIDEO else _animation(path)
    found = list(islice(frames, start, wanted[-1] + 1, stride))
    if len(found) < number:
        raise ImageError(f"{path}: ends before frame {wanted[-1]}; replace it")
    return found


def _stills(folder: Path) -> list[Path]:
    def by_numbers(path: Path) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    stills = [path for path in folder.iterdir() if path.name.lower().endswith(STILL)]
    return sorted((path for path in stills if not path.name.startswith(".")), key=by_numbers)


def _animation(path: Path) -> Iterator[Image.Image]:
    with Image.open(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            try:
                image.seek(i)
                frame = image.convert("RGBA")
            except Exception as error:  # decoders raise anything on broken bytes
                raise ImageError(f"{path}: frame {i} is broken ({error}); replace it") from error
            yield Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")


def _check_codec(root: Path) -> None:
    if not any(map(importlib.util.find_spec, ("imageio_ffmpeg", "av"))):
        raise UserError(
            f"{root}: holds MP4, which needs ffmpeg: pip install imageio-ffmpeg, or pip install av; or save "
            "the clips as GIF, WebP or folders of frames"
        )


def _video(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    try:
        yield from (_by_ffmpeg if importlib.util.find_spec("imageio_ffmpeg") else _by_pyav)(path, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # each decoder raises its own kinds
        said = str(error).strip().splitlines()
        raise ImageError(
            f"{path}: cannot be decoded ({said[-1] if said else error!r}); replace it"
        ) from error


def _by_ffmpeg(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    from imageio_ffmpeg import read_frames

    frames = read_frames(str(path), pix_fmt="rgb24")
    size = next(frames)["size"]  # pyright: ignore[reportArgumentType]  # what comes first tells of the rest
    _check_pixels(path, size, max_pixels)
    for frame in frames:
        yield Image.fromarray(np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3))


def _by_pyav(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            _check_pixels(path, (frame.width, frame.height), max_pixels)
            yield frame.to_image()


def _check_pixels(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            f"{path}: {size[0]}x{size[1]} is over {max_pixels:,} pixels; shrink it or allow more"
        )
