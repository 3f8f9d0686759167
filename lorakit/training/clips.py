"""How a clip is shown to a motion adapter: a camera over a still picture, or frames of a film. No torch here.

A camera looks at a rectangle of the still, `side` pixels of which make one of a frame, and moves by the poses
of animate.py. What it does and where it starts follow from the picture and the number of the take.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from PIL import Image

from lorakit.ground.randomness import uniform
from lorakit.motion.camera import Pose
from lorakit.pictures.captions import DataError, Fault
from lorakit.pictures.clips import clip_frames
from lorakit.pictures.folder import Row
from lorakit.pictures.images import crop, load_image, resize_to_cover, to_array
from lorakit.pictures.views import Shape, entry_key

LEAST_SIDE = 0.75
"""Of the largest rectangle that the camera may look at: of a smaller one the caption may not be true."""
FINE = 2
"""Points along each side of a pixel of a frame, whose mean it is."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class StillClip:
    """What a camera sees of a still picture.

    `corner` is the place, in pixels of the still, of the corner of all that the camera sees.
    """

    row: Row
    shape: Shape
    poses: tuple[Pose, ...]
    side: float
    corner: tuple[float, float]

    def entry(self, vae_hash: str, dtype: str = "float32") -> bytes:
        """The name under which its moments are cached."""
        poses = [(pose.x, pose.y, pose.scale, pose.angle) for pose in self.poses]
        place = self.shape, poses, self.side, self.corner
        return entry_key("still clip", self.row.sha256, *place, vae_hash, dtype)

    def frames(self, max_pixels: int) -> Iterator[np.ndarray]:
        """(3, H, W) in [-1, 1] of each frame."""
        picture = load_image(self.row.source, name=self.row.name, max_pixels=max_pixels)
        width, height = (max(1, round(FINE * side / self.side)) for side in picture.size)
        large = picture.resize((width, height), Image.Resampling.LANCZOS)
        grown = width / picture.width, height / picture.height
        box = seen_box(self.poses, self.shape)
        start = self.corner[0] - box[0] * self.side, self.corner[1] - box[1] * self.side
        for pose in self.poses:
            yield to_array(self._seen(large, pose, start, grown).reduce(FINE))

    def _seen(
        self, large: Image.Image, pose: Pose, start: tuple[float, float], grown: tuple[float, float]
    ) -> Image.Image:
        """A frame, FINE times as large.

        Args:
            start: the place, in pixels of the still, where the camera starts.
            grown: `large` over the still, in width and height.
        """
        width, height = (FINE * side for side in self.shape)
        step = self.side / FINE / pose.scale
        rows = []
        for place, factor, turn in zip(
            (start[0] + pose.x * self.side, start[1] + pose.y * self.side),
            grown,
            ((math.cos(pose.angle), -math.sin(pose.angle)), (math.sin(pose.angle), math.cos(pose.angle))),
            strict=True,
        ):
            a, b = (step * part * factor for part in turn)
            rows += [a, b, place * factor - a * width / 2 - b * height / 2]
        return large.transform((width, height), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class FilmClip:
    """Every `stride`-th frame of a film from `start` on, scaled to cover `shape` and cut in the middle."""

    row: Row
    shape: Shape
    start: int
    count: int
    stride: int

    def entry(self, vae_hash: str, dtype: str = "float32") -> bytes:
        """The name under which its moments are cached."""
        part = self.start, self.count, self.stride
        return entry_key("film clip", self.row.sha256, self.shape, part, vae_hash, dtype)

    def frames(self, max_pixels: int) -> Iterator[np.ndarray]:
        """(3, H, W) in [-1, 1] of each frame."""
        assert self.row.path is not None
        for image in clip_frames(self.row.path, self.start, self.count, self.stride, max_pixels):
            yield to_array(crop(resize_to_cover(image, *self.shape), *self.shape))


Clip = StillClip | FilmClip


def seen_box(poses: Sequence[Pose], shape: Shape) -> Box:
    """Left, top, right and bottom of all that a camera sees, in pixels of a frame from where it starts."""
    xs, ys = [], []
    for pose, (u, v) in product(poses, product((-0.5, 0.5), repeat=2)):
        x, y = u * shape[0] / pose.scale, v * shape[1] / pose.scale
        xs.append(pose.x + math.cos(pose.angle) * x - math.sin(pose.angle) * y)
        ys.append(pose.y + math.sin(pose.angle) * x + math.cos(pose.angle) * y)
    return min(xs), min(ys), max(xs), max(ys)


def still_clips(
    row: Row, shape: Shape, paths: Sequence[Sequence[Pose]], takes: int, enlarge: float
) -> list[StillClip]:
    """The takes of each camera: the first is the largest and lies in the middle, others are drawn."""
    clips = []
    for number, poses in enumerate(paths):
        box = seen_box(poses, shape)
        width, height = box[2] - box[0], box[3] - box[1]
        largest = min(row.width / width, row.height / height)
        least = min(largest, max(LEAST_SIDE * largest, _finest(poses, enlarge)))
        for take in range(takes):
            draw = partial(uniform, 0, "take", row.sha256, number, take)
            side = least + (largest - least) * draw("side") if take else largest
            rooms = row.width - side * width, row.height - side * height
            at = (draw("x"), draw("y")) if take else (0.5, 0.5)
            corner = rooms[0] * at[0], rooms[1] * at[1]
            clips.append(StillClip(row, shape, tuple(poses), side, corner))
    return clips


def film_clips(row: Row, shape: Shape, count: int, stride: int, takes: int) -> list[FilmClip]:
    """Takes of a film that start at moments spread evenly over it; fewer where it has not as many."""
    last = row.frames - ((count - 1) * stride + 1)
    starts = dict.fromkeys(round(take * last / max(takes - 1, 1)) for take in range(takes))
    return [FilmClip(row, shape, start, count, stride) for start in starts]


def _finest(poses: Sequence[Pose], enlarge: float) -> float:
    """Pixels of a still that a frame's must be made of at the least, where the camera is far."""
    return max(1.0, *(pose.scale for pose in poses)) / enlarge


def check_stills(
    where: str,
    rows: Sequence[Row],
    shapes: Sequence[Shape],
    paths_of: Sequence[Sequence[Sequence[Pose]]],
    enlarge: float,
) -> None:
    """Refuse stills that a camera would look beyond, or enlarge.

    Args:
        paths_of: the paths of all cameras, for each still.
        enlarge: how much it may, at most.

    Raises:
        DataError: names each, what it has and what it needs.
    """
    faults = []
    for row, shape, paths in zip(rows, shapes, paths_of, strict=True):
        needed = [1, 1]
        for poses in paths:
            left, top, right, bottom = seen_box(poses, shape)
            scale = _finest(poses, enlarge)
            sides = math.ceil(scale * (right - left) - 1e-6), math.ceil(scale * (bottom - top) - 1e-6)
            needed = [max(pair) for pair in zip(needed, sides, strict=True)]
        if row.width < needed[0] or row.height < needed[1]:
            faults.append(
                Fault(
                    f"{where}/{row.name}",
                    f"is {row.width}x{row.height}, the camera needs {needed[0]}x{needed[1]} pixels",
                    "use larger pictures, a smaller motion.camera or resolution; or raise motion.enlarge, "
                    "which makes them soft",
                )
            )
    if faults:
        raise DataError(faults)
