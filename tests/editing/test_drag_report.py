"""What track.json and the lines say of a drag: places of the picture, and whether it shows what it should."""

from typing import Any

import pytest
from PIL import Image

from lorakit.editing.drag_plan import DragPlan, View
from lorakit.editing.drag_report import Drag, Found, disagreements, lines_of, track_of

BASE: Any = None
WAY = ((8.0, 12.0), (16.0, 12.0))


@pytest.fixture
def plan():
    """Of a picture of 64 pixels that is seen at 32."""
    return DragPlan(BASE, (32, 32), (), (), None, (), View((64, 64), (32, 32)), (WAY,))


def result(seen=(16.0, 12.0), likeness=0.9):
    found = [Found((16.0, 12.0), seen, likeness)]
    return Drag(Image.new("RGB", (32, 32)), [(WAY[0],), (WAY[1],)], "arrived", found, 1.0)


def test_places_are_those_of_the_picture_as_it_is(plan):
    (way,) = track_of(plan, result(seen=(16.0, 14.0)))["ways"]
    assert (
        way["handle"] == [16, 24] and way["target"] == way["tracked"] == [32, 24] and way["seen"] == [32, 28]
    )
    assert way["left"] == 4 and way["agree"] and way["track"] == [[16, 24], [32, 24]]
    assert lines_of(plan, result()) == [[WAY[0], WAY[1], WAY[1]]]


def test_a_tracker_that_the_picture_does_not_bear_out_is_said_and_no_other(plan):
    assert not list(disagreements(plan, result(seen=(16.0, 16.0))))
    (line,) = disagreements(plan, result(seen=(16.0, 16.5)))
    assert line.startswith("way 0: ") and "seen at [32.0, 33.0], 9 pixels away: trust the picture" in line
    assert not track_of(plan, result(seen=(16.0, 16.5)))["ways"][0]["agree"]


def test_what_the_picture_hardly_shows_is_said(plan):
    (line,) = disagreements(plan, result(likeness=0.5))
    assert "hardly seen anywhere" in line
    assert not track_of(plan, result(likeness=0.5))["ways"][0]["agree"]
