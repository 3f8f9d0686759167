"""The page of the demo holds what was made, links only to what lies beside it, and moves in a browser."""

import numpy as np
import pytest
from pages import HOSTILE, Elements, data_of, encoded, seen
from PIL import Image

from lorakit.film.demo_page import Row, demo_page

COLOURS = [(40 * i, 250 - 40 * i, 90) for i in range(6)]
PHOTO, FITTED = (220, 20, 20), (20, 20, 220)


def make_page(text="a lake"):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in (PHOTO, (9, 9, 9), FITTED)]
    rows = [Row(text, text, pictures, ["input", "without", text])] * 2
    made = {"mountain.html": text, "ckpt/mountain.safetensors": text, """it's "x".html""": text}
    frames = [encoded(colour) for colour in COLOURS]
    return demo_page(rows, frames, made=made, times={text: 7.4}, commands={text: f"echo {text}"})


def is_colour(tab, where, colour):
    return np.abs(np.subtract(seen(tab, where), colour)).max() <= 6


def test_it_links_to_what_lies_beside_it_and_loads_nothing():
    page = make_page()
    elements = Elements(page)
    assert [each["href"] for each in elements.of("a")] == ["mountain.html", """it's "x".html"""]
    assert not elements.of("img") and len(elements.of("script")) == 2
    for text in ("http:", "https:", "@import", "url(", "<link", "<iframe"):
        assert text not in page, text
    assert len(data_of(page)["frames"]) == 6 and "7 s" in elements.text


def test_hostile_text_runs_nothing(opened):
    page = make_page(HOSTILE)
    assert Elements(page).text.count(HOSTILE) >= 5 and len(Elements(page).of("script")) == 2
    tab = opened(page)
    assert tab.evaluate("window.hacked") is None and HOSTILE in tab.locator("#rows").inner_text()


def test_the_film_plays_and_the_photograph_is_uncovered(opened):
    tab = opened(make_page())
    assert is_colour(tab, "#film img", COLOURS[0])
    tab.keyboard.press("End")
    assert is_colour(tab, "#film img", COLOURS[5]) and tab.locator("#readout").inner_text() == "frame 5 of 5"
    tab.locator("#play").click()
    while tab.locator("#readout").inner_text() != "frame 4 of 5":
        tab.wait_for_timeout(20)
    tab.locator("#play").click()
    line = tab.locator(".divider input").first
    box = line.bounding_box()
    for share, colour in ((0.9, PHOTO), (0.1, FITTED)):
        line.click(position={"x": share * box["width"], "y": box["height"] / 2})
        assert is_colour(tab, ".divider >> nth=0", colour)


@pytest.mark.parametrize("width", [340, 1400])
def test_it_fits_phones_and_desks(opened, width):
    tab = opened(make_page("x" * 90), width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
