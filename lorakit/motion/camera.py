"""Where a camera looks in each frame of a film, and how what it sees moves. No torch here.

Places are (x, y) in pixels, x to the right and y down, from the centre of what the camera sees at its start.
A point p of the picture, from its centre, shows the place c + R(angle) p / scale of the scene.
"""

import cmath
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.film.pacing import Easing, ease


@dataclass(frozen=True)
class Pose:
    """`x`, `y` the place at the picture's centre; `scale` 2 shows things twice as large; `angle` radians,
    clockwise, by which the camera is turned.
    """

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0


@dataclass(frozen=True)
class Move:
    """How a picture moves into another: p goes to m p + d, with p, m and d as complex numbers.

    `dx`, `dy` pixels at the picture's centre; `log_scale` natural logarithm of the growth; `angle` radians,
    clockwise as one looks at it.
    """

    dx: float
    dy: float
    log_scale: float
    angle: float

    def then(self, other: "Move") -> "Move":
        """This move and another after it."""
        place = other._matrix() * complex(self.dx, self.dy) + complex(other.dx, other.dy)
        angle, log_scale = self.angle + other.angle, self.log_scale + other.log_scale
        return Move(place.real, place.imag, log_scale, angle)

    def _matrix(self) -> complex:
        return cmath.rect(math.exp(self.log_scale), self.angle)


def between(before: Pose, after: Pose) -> Move:
    """How what is seen moves when the camera does."""
    way = complex(before.x - after.x, before.y - after.y)
    place = after.scale * cmath.rect(1, -after.angle) * way
    return Move(place.real, place.imag, math.log(after.scale / before.scale), before.angle - after.angle)


def path(
    frames: int, shape: tuple[int, int], keys: Mapping[str, Sequence[float]], easing: Easing, loop: bool
) -> list[Pose]:
    """The pose of every frame.

    Args:
        shape: width and height of the picture.
        keys: `pan` in widths to the right, `tilt` in heights upwards, `zoom` factors, `roll` degrees
            clockwise: what holds at moments spread evenly over the film. In a `loop` the first of them holds
            again after the last frame.
    """
    across, down, zoom, roll = (
        track(keys[name], frames, easing, loop) for name in ("pan", "tilt", "zoom", "roll")
    )
    rows = zip(across, down, zoom, roll, strict=True)
    width, height = shape
    return [Pose(x * width, -y * height, scale, math.radians(angle)) for x, y, scale, angle in rows]


def track(keys: Sequence[float], frames: int, easing: Easing, loop: bool) -> list[float]:
    """A value for each frame, between those of the keys."""
    places = moments(len(keys), frames, loop)
    around = [*keys, keys[0]] if loop else list(keys)
    values = []
    for place in places:
        left = min(int(place), max(len(around) - 2, 0))
        share = float(ease([place - left], easing)[0])
        right = around[min(left + 1, len(around) - 1)]
        values.append(around[left] + share * (right - around[left]))
    return values


def moments(keys: int, frames: int, loop: bool) -> list[float]:
    """Where each frame lies among keys that are spread evenly over the film; key k lies at k."""
    if loop:
        return [i * keys / frames for i in range(frames)]
    return [i * (keys - 1) / max(frames - 1, 1) for i in range(frames)]
