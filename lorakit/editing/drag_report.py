"""What came of a drag, in words and in track.json. No torch here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lorakit.editing.drag_plan import DragPlan
from lorakit.pictures.warping import Point

DIFFER = 4.0
"""Pixels of what the model sees from which tracker and picture do not agree: half a cell of SD's latents."""
ALIKE = 0.6
"""Correlation of colours below which the picture hardly shows what was dragged."""


@dataclass(frozen=True)
class Found:
    """A handle afterwards: where its tracker has it, where the picture shows it, and how like it that is."""

    tracked: Point
    seen: Point
    likeness: float


@dataclass(frozen=True)
class Drag:
    """A result. `track` has the places of all handles step by step, in pixels of what the model sees."""

    image: Image.Image
    track: Sequence[tuple[Point, ...]]
    stopped: str
    found: Sequence[Found]
    seconds: float


def track_of(plan: DragPlan, result: Drag) -> dict[str, Any]:
    """What track.json says of a result, places in pixels of the picture."""
    ways = []
    for number, ((handle, target), found) in enumerate(zip(plan.ways, result.found, strict=True)):
        way: dict[str, Any] = {
            "handle": handle,
            "target": target,
            "tracked": found.tracked,
            "seen": found.seen,
        }
        way = {name: _own(plan, point) for name, point in way.items()}
        way["left"] = round(math.dist(found.seen, target) / plan.view.scale, 2)
        way["likeness"] = round(found.likeness, 4)
        way["agree"] = _agree(found)
        way["track"] = [_own(plan, places[number]) for places in result.track]
        ways.append(way)
    return {"stopped": result.stopped, "steps": len(result.track) - 1, "ways": ways}


def disagreements(plan: DragPlan, result: Drag) -> Iterator[str]:
    """A line for each handle whose tracker and picture do not agree."""
    for number, found in enumerate(result.found):
        if found.likeness < ALIKE:
            yield (
                f"way {number}: what was about the handle is hardly seen anywhere in the result: it may be "
                "smaller than the base can show"
            )
        elif not _agree(found):
            away = math.dist(found.tracked, found.seen) / plan.view.scale
            yield (
                f"way {number}: the handle is followed to {_own(plan, found.tracked)}, and what was about it "
                f"is seen at {_own(plan, found.seen)}, {away:.0f} pixels away: trust the picture"
            )


def lines_of(plan: DragPlan, result: Drag) -> list[list[Point]]:
    """For the page: each handle's track and last its target."""
    handles = [[places[number] for places in result.track] for number in range(len(plan.ways))]
    return [[*track, target] for track, (_, target) in zip(handles, plan.ways, strict=True)]


def _agree(found: Found) -> bool:
    return math.dist(found.tracked, found.seen) <= DIFFER and found.likeness >= ALIKE


def _own(plan: DragPlan, point: Point) -> list[float]:
    return [round(value, 2) for value in plan.view.own(point)]
