"""The page of a folder of pictures has its sheets, settings and commands, and moves in a browser."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from pages import HOSTILE, Elements, data_of, seen
from PIL import Image
from small import settings_of

from lorakit.ground.config import load_config
from lorakit.sampling.gallery import Gallery, Picture
from lorakit.sampling.generate_plan import GenerateConfig
from lorakit.sampling.page import gallery_page, write_page
from lorakit.sampling.style_plan import StyleConfig

COLOURS = [(40 * i, 250 - 40 * i, 90) for i in range(6)]
INPUTS = [(200, 10, 10), (10, 10, 200)]
REPORT = {"seconds": 12.3, "definitions": {"edge_f1": "of the edges"}}


def plain(colour):
    return Image.new("RGB", (48, 32), colour)


@pytest.fixture
def filled(tmp_path):
    """Factory of a gallery of six pictures: two subjects, three columns of a grid or three seeds."""

    def make(cls=StyleConfig, grid=True, prompt="a lake", folder='it\'s "mine" & <b>', **changes):
        grid = {"guidance_scale": [1, 2, 3]} if grid is True else grid
        keys = {"grid": grid} if grid else {"seed": 5}
        keys |= {"image": "x"} if cls is StyleConfig else {}
        cfg = load_config(cls, None, settings_of(**(keys | changes))).config
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        leads = [[("input", plain(c)), ("edges", plain((0, 0, 0)))] for c in INPUTS]
        subjects = [f"{HOSTILE} {i}" for i in range(2)]
        gallery = Gallery(place, cfg, subjects, leads if cls is StyleConfig else ())
        for i, colour in enumerate(COLOURS):
            subject, column = divmod(i, 3)
            seed = 5 if grid else 5 + column
            own = cfg.model_copy(update={"seed": seed, "guidance_scale": column + 1.0, "grid": {}})
            own = own.resolved()[0].model_copy(update={"prompt": prompt})
            cell = (0, column) if grid else (0, 0)
            facts = {"seconds": 0.5, "edge_f1": i / 10}
            gallery.add(Picture(plain(colour), subject, seed, cell, own, prompt, facts))
        return gallery

    return make


def open_folder(opened, gallery, *args, **options):
    write_page(gallery, REPORT)
    return opened(gallery.folder / "index.html", *args, **options)


# ---- the file ----


def test_each_picture_has_its_own_settings_and_command(filled):
    found = data_of(gallery_page(filled(), REPORT))
    whole = [found["common"] | each["config"] for each in found["pictures"]]
    assert [each["guidance_scale"] for each in whole] == [1, 2, 3] * 2
    assert "guidance_scale" not in found["common"] and found["common"]["image"] == "x"
    assert found["pictures"][4]["facts"]["guidance"] == "2"
    gallery = filled()
    words = shlex.split(found["again"] + found["pictures"][3]["path"])
    assert words == ["python", "style_transfer.py", "--from", str(gallery.folder / "0003.png")]
    assert data_of(gallery_page(filled(GenerateConfig), REPORT))["again"] == "python generate.py --from "


def test_the_page_stands_as_the_sheet_does(filled):
    """A grid's columns, or the seeds; the sheet of two axes is a table for each subject."""
    (table,) = data_of(gallery_page(filled(), REPORT))["tables"]
    assert table["columns"] == [f"guidance_scale {i}" for i in (1, 2, 3)]
    assert [cells for _, _, cells in table["rows"]] == [[0, 1, 2], [3, 4, 5]]
    (table,) = data_of(gallery_page(filled(GenerateConfig, grid=False), REPORT))["tables"]
    assert table["columns"] == ["seed 5", "seed 6", "seed 7"]
    both = data_of(gallery_page(filled(grid={"guidance_scale": [1, 2, 3], "strength": [0.5]}), REPORT))
    assert len(both["tables"]) == 2 and both["tables"][1]["title"] == f"{HOSTILE} 1"


def test_what_a_user_wrote_stays_text_and_nothing_is_loaded_from_elsewhere(filled):
    gallery = filled(prompt=HOSTILE, negative_prompt=HOSTILE, name="x<script>")
    page = gallery_page(gallery, REPORT)
    elements = Elements(page)
    assert len(elements.of("script")) == 2 and not elements.of("img")
    assert "</script>" not in elements.data and "<!--" not in elements.data
    assert data_of(page)["pictures"][0]["facts"]["prompt"] == HOSTILE
    for text in ("http:", "https:", "@import", "url(", "<link", "<iframe"):
        assert text not in page, text
    (policy,) = [each["content"] for each in elements.of("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; img-src data: 'self' file:; ")


def test_the_page_goes_with_the_run_and_what_is_beside_it_stays(filled):
    gallery = filled()
    write_page(gallery, REPORT)
    (gallery.folder / "mine.html").write_text("mine")
    filled()
    assert not (gallery.folder / "index.html").exists() and (gallery.folder / "mine.html").exists()


# ---- in a browser ----


def is_colour(tab, where, colour):
    return np.abs(np.subtract(seen(tab, where), colour)).max() <= 6


def wait_for_pictures(tab):
    """Of the stage: those of the sheet that are out of sight are not loaded."""
    while not tab.evaluate("[...$('stage').querySelectorAll('img')].every((image) => image.naturalWidth)"):
        tab.wait_for_timeout(20)


def test_a_picture_is_chosen_with_its_settings(opened, filled):
    gallery = filled(GenerateConfig)
    tab = open_folder(opened, gallery, permissions=["clipboard-read", "clipboard-write"])
    wait_for_pictures(tab)
    assert is_colour(tab, "#stage img", COLOURS[0])
    tab.locator(".sheet button").nth(4).click()
    wait_for_pictures(tab)
    assert is_colour(tab, "#stage img", COLOURS[4]) and tab.locator("#readout").inner_text() == "0004.png"
    assert json.loads(tab.locator("#config").text_content())["guidance_scale"] == 2
    tab.locator("#again button").click()
    tab.wait_for_selector("text=Copied")
    copied = shlex.split(tab.evaluate("navigator.clipboard.readText()"))
    assert copied == ["python", "generate.py", "--from", str(gallery.folder / "0004.png")]
    tab.keyboard.press("ArrowRight")
    wait_for_pictures(tab)
    assert is_colour(tab, "#stage img", COLOURS[5]) and not tab.locator("#comparing").is_visible()


def test_the_divider_uncovers_the_input(opened, filled):
    tab = open_folder(opened, filled())
    wait_for_pictures(tab)
    range_ = tab.locator(".divider input")
    box = range_.bounding_box()
    shown = []
    for share in (0.9, 0.1):
        tab.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        shown.append(seen(tab, ".divider"))
    assert np.abs(np.subtract(shown[0], INPUTS[0])).max() <= 6  # the line is at the right: the input is seen
    assert np.abs(np.subtract(shown[1], COLOURS[0])).max() <= 6
    tab.locator("#compare").uncheck()
    wait_for_pictures(tab)
    assert tab.locator(".divider").count() == 0 and is_colour(tab, "#stage img", COLOURS[0])


def test_ways_are_drawn_over_the_picture_and_taken_away(opened, filled):
    gallery = filled(GenerateConfig)
    assert not open_folder(opened, gallery).locator(".ways, #waying:visible").count()
    first = gallery.pictures[0]
    gallery.pictures[0] = replace(first, ways=[[(4.0, 8.0), (20.0, 8.0), (40.0, 24.0)]])
    tab = open_folder(opened, gallery)
    wait_for_pictures(tab)
    box, line = (tab.locator(where).bounding_box() for where in ("#stage img", ".ways line"))
    assert line["x"] == pytest.approx(box["x"] + 4 / 48 * box["width"], abs=2)
    assert line["width"] == pytest.approx(36 / 48 * box["width"], abs=4)
    tab.locator("#waysshown").uncheck()
    assert not tab.locator(".ways").count() and tab.locator("#waying").is_visible()
    tab.keyboard.press("ArrowRight")
    assert not tab.locator("#waying").is_visible()


def test_the_sheet_is_zoomed(opened, filled):
    tab = open_folder(opened, filled())
    wait_for_pictures(tab)
    before = tab.locator(".sheet button img").first.bounding_box()["width"]
    tab.keyboard.press("-")
    smaller = tab.locator(".sheet button img").first.bounding_box()["width"]
    tab.locator("#zoom").fill("400")
    assert smaller == before - 32 and tab.locator(".sheet button img").first.bounding_box()["width"] == 400


def test_hostile_text_runs_nothing(opened, filled):
    tab = open_folder(opened, filled(prompt=HOSTILE, negative_prompt=HOSTILE))
    wait_for_pictures(tab)
    assert tab.evaluate("window.hacked") is None
    assert HOSTILE in tab.locator("#about").inner_text()


@pytest.mark.parametrize("width", [340, 1400])
@pytest.mark.parametrize("cls", [GenerateConfig, StyleConfig])
def test_it_fits_phones_and_desks(opened, filled, width, cls):
    tab = open_folder(opened, filled(cls, prompt="x" * 90), width)
    wait_for_pictures(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
