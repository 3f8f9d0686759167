"""Ways drawn over a picture. No torch here."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from lorakit.pictures.warping import Point, Way

LEAST = 512
"""Pixels of the shorter side, so that thin lines can be told apart."""
WAY, TRACK = "#58a6ff", "#f0883e"


def draw_ways(picture: Image.Image, ways: Sequence[Way], track: Sequence[Sequence[Point]]) -> Image.Image:
    """A larger copy with each way, a ring about its target and what was tracked of it.

    Args:
        track: the places of all handles, step by step; places are in pixels of `picture`.
    """
    scale = max(1, -(-LEAST // min(picture.size)))
    size = picture.width * scale, picture.height * scale
    drawn = picture.resize(size, Image.Resampling.LANCZOS)
    pen, thin = ImageDraw.Draw(drawn), max(2, min(size) // 200)

    def line(points: Iterable[Point], colour: str) -> None:
        places = [(x * scale, y * scale) for x, y in points]
        pen.line(places, "white", 2 * thin + 2)
        pen.line(places, colour, thin)

    def ring(point: Point, radius: int, colour: str, fill: str | None = None) -> None:
        x, y = (value * scale for value in point)
        for grown, outline in ((2, "white"), (0, colour)):
            r = radius + grown
            pen.ellipse((x - r, y - r, x + r, y + r), fill if not grown else None, outline, thin)

    for number, (handle, target) in enumerate(ways):
        line((handle, target), WAY)
        line([handle, *(places[number] for places in track)], TRACK)
        ring(handle, 2 * thin, WAY, WAY)
        ring(target, 4 * thin, WAY)
    return drawn
