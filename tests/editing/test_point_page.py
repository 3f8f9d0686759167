"""The page to point with: handles and targets, a painted mask, what it saves and drag.py takes."""

import base64
import io
import json

import numpy as np
import pytest
from galleries import pictures_in
from pages import HOSTILE, Elements, data_of, wait_until
from PIL import Image
from small import settings_of

import drag
import edit
from lorakit.editing.drag_config import DragConfig
from lorakit.editing.point_page import point_page, write_point_page
from lorakit.ground.config import load_config
from lorakit.pictures import warping
from lorakit.pictures.painted import EMBEDDED

SIZE = (120, 80)


@pytest.fixture
def picture(tmp_path):
    """A bright disc at (30, 40) on a slope."""
    x = np.arange(SIZE[0])[None] / SIZE[0] * np.ones((SIZE[1], 1))
    slope = np.stack([0.2 + 0.5 * x, 0.6 - 0.4 * x, 0.3 + 0 * x], 2).astype(np.float32)
    share = warping.disc(SIZE[::-1], (30, 40), 8)[..., None]
    path = tmp_path / "picture.png"
    Image.fromarray(np.uint8(255 * ((1 - share) * slope + share))).save(path)
    return path


@pytest.fixture
def config(picture, tiny_base, tmp_path):
    def make(**changes):
        keys = dict(
            image=str(picture), prompt="a disc", pretrained_model_name_or_path=str(tiny_base),
            output_dir=str(tmp_path / "out"), name="run",
        )  # fmt: skip
        return load_config(DragConfig, None, settings_of(**(keys | changes))).config

    return make


@pytest.fixture
def shown(opened, config):
    """Factory of the page in a browser."""

    def make(width=1000, **changes):
        tab = opened(point_page(config(**changes)), width)
        wait_until(tab, "document.body.dataset.frames > 0")
        return tab

    return make


def place(tab, x, y):
    """Where a place of the picture is on the screen."""
    box = tab.locator("#canvas").bounding_box()
    return box["x"] + x / SIZE[0] * box["width"], box["y"] + y / SIZE[1] * box["height"]


def settle(tab):
    """The page has taken the hands' events, and is drawn."""
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def click(tab, x, y):
    tab.mouse.click(*place(tab, x, y))
    settle(tab)


def stroke(tab, *places):
    tab.mouse.move(*place(tab, *places[0]))
    tab.mouse.down()
    for each in places[1:]:
        tab.mouse.move(*place(tab, *each), steps=6)
    tab.mouse.up()
    settle(tab)


def saved(tab, button="#save"):
    with tab.expect_download() as download:
        tab.locator(button).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def mask_of(config):
    data = base64.b64decode(config["mask"].removeprefix(EMBEDDED))
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def colour(tab, x, y):
    """What is drawn at a place of the picture, whatever lies over it."""
    settle(tab)
    values = (
        "Array.from(moved.data.slice(4 * ({1} * canvas.width + {0}), 4 * ({1} * canvas.width + {0}) + 3))"
    )
    return tab.evaluate(values.format(x, y))


# ---- the file ----


def test_the_page_holds_all_that_it_shows_and_what_a_user_wrote_stays_text(config):
    page = point_page(config(prompt=HOSTILE))
    elements = Elements(page)
    assert len(elements.of("script")) == 2 and not elements.of("img")
    assert data_of(page)["config"]["prompt"] == HOSTILE
    for text in ("http:", "https:", "@import", "url(", "<link", "<iframe"):
        assert text not in page, text
    (policy,) = [each["content"] for each in elements.of("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; img-src data:; ")


def test_the_command_line_writes_it_without_torch_and_goes_on_with_a_config(
    command, config, picture, tmp_path
):
    words = settings_of(output_dir=str(tmp_path / "out"))
    result = command("drag", ["--page", str(picture), *words])
    assert result.code == 0 and not result.torch and "picture_drag.html: open it" in result.out
    page = (tmp_path / "out/picture_drag.html").read_text(encoding="utf-8")
    assert data_of(page)["size"] == list(SIZE) and data_of(page)["points"] == []
    made = tmp_path / "drag.json"
    made.write_text(json.dumps({"image": str(picture), "points": [[[30, 40], [60, 40]]], "radius": 7}))
    assert command("drag", [str(made), "--page", *words]).code == 0
    found = data_of((tmp_path / "out/picture_drag.html").read_text(encoding="utf-8"))
    assert found["points"] == [[[30, 40], [60, 40]]] and found["config"]["radius"] == 7
    refused = command("drag", ["--page", str(tmp_path / "none.png"), *words])
    assert refused.code == 2 and "none.png" in refused.err
    assert write_point_page(config()).name == "picture_drag.html"


# ---- in a browser ----


def test_two_points_and_a_mask_are_saved_and_dragged(shown, tmp_path):
    tab = shown()
    click(tab, 30, 40)
    assert "Click where it shall go" in tab.locator("#told").inner_text()
    click(tab, 80, 42)
    tab.locator("[value=paint]").check()
    tab.locator("#brush").fill("16")
    stroke(tab, (25, 40), (90, 42))
    tab.locator("#radius").fill("9")
    tab.locator("#prompt").fill("a bright disc")
    name, text = saved(tab)
    found = json.loads(text)
    assert name == "drag.json" and found["prompt"] == "a bright disc" and found["radius"] == 9
    np.testing.assert_allclose(found["points"], [[[30, 40], [80, 42]]], atol=0.5)
    mask = mask_of(found)
    assert mask.shape == SIZE[::-1] and set(np.unique(mask)) == {0, 255}
    wanted = warping.capsule(mask.shape, [((25, 40), (90, 42))], 16)
    assert ((mask > 0) != wanted).mean() < 0.02

    (tmp_path / "drag.json").write_bytes(text)
    quick = settings_of(num_inference_steps=4, start=0.5)
    assert drag.main([str(tmp_path / "drag.json"), *quick]) == 0
    (dragged,) = pictures_in(tmp_path / "out/run")
    own = ("image", "mask", "prompt", "pretrained_model_name_or_path")
    keys = {key: found[key] for key in own} | {
        "target_prompt": "a dark disc",
        "output_dir": str(tmp_path / "edit"),
    }
    (tmp_path / "edit.json").write_text(json.dumps(keys | {"num_inference_steps": 4, "name": "run"}))
    assert edit.main([str(tmp_path / "edit.json")]) == 0
    (edited,) = pictures_in(tmp_path / "edit/run")
    assert (dragged[-1] == edited[-1]).all() and (dragged != edited).any()  # the last row is outside


def test_the_preview_shows_the_moved_pixels_and_undo_takes_them_back(shown, picture):
    tab = shown(radius=11)
    stroke(tab, (30, 40), (80, 40))  # from one to the other
    wait_until(tab, "document.getElementById('told').textContent.includes('1 way of 50 pixels')")
    before = np.asarray(Image.open(picture).convert("RGB"))
    moved = np.asarray(colour(tab, 80, 40), int)
    assert np.abs(moved - before[40, 30]).max() <= 8  # the disc stands at its target
    left = np.asarray(colour(tab, 30, 40), int)
    assert np.abs(left - (255 * np.array([0.325, 0.5, 0.3]))).max() <= 12  # and the slope goes on behind it
    way = ((30, 40), (80, 40))
    pixels = warping.move(before.astype(np.float32), [way], 5, np.ones(before.shape[:2], bool))
    tab.locator("#radius").fill("5")
    for x, y in ((30, 40), (80, 40), (86, 40), (30, 46), (55, 20)):
        assert np.abs(colour(tab, x, y) - pixels[y, x]).max() <= 10, (x, y)
    tab.locator("#kind").select_option("stretch")
    mask = np.ones(before.shape[:2], bool)
    pixels = warping.stretch(before.astype(np.float32), [way], mask)
    for x, y in ((80, 40), (60, 30), (30, 40), (4, 4)):
        assert np.abs(colour(tab, x, y) - pixels[y, x]).max() <= 25, (x, y)
    tab.locator("#undo").click()
    wait_until(tab, "moved === null")
    assert json.loads(saved(tab)[1])["points"] == []


def test_the_mask_is_painted_erased_and_undone(shown):
    tab = shown()
    click(tab, 30, 40)
    click(tab, 80, 40)
    tab.locator("#around").click()
    around = mask_of(json.loads(saved(tab)[1]))
    assert around[40, 30] and around[40, 80] and not around[2, 55]
    tab.locator("[value=erase]").check()
    tab.locator("#brush").fill("10")
    stroke(tab, (55, 20), (55, 60))
    erased = mask_of(json.loads(saved(tab)[1]))
    assert not erased[40, 55] and erased[40, 30]
    tab.keyboard.press("Control+z")
    wait_until(tab, "actions.length === 2")
    assert (mask_of(json.loads(saved(tab)[1])) == around).all()
    name, png = saved(tab, "#savemask")
    assert name == "mask.png" and (np.asarray(Image.open(io.BytesIO(png)).convert("L")) == around).all()
    tab.locator("#clear").click()
    wait_until(tab, "actions.length === 0")
    assert json.loads(saved(tab)[1])["mask"] is None


def test_it_begins_with_the_points_and_the_mask_of_a_config(shown, tmp_path):
    painted = np.zeros(SIZE[::-1], np.uint8)
    painted[20:60, 10:100] = 255
    Image.fromarray(painted).save(tmp_path / "m.png")
    tab = shown(points=[[[30, 40], [60, 44]]], mask=str(tmp_path / "m.png"), kind="stretch", radius=6)
    wait_until(tab, "hasMask()")
    found = json.loads(saved(tab)[1])
    np.testing.assert_allclose(found["points"], [[[30, 40], [60, 44]]], atol=0.1)
    assert found["kind"] == "stretch" and found["radius"] == 6 and (mask_of(found) == painted).all()


def test_zoom_makes_the_canvas_larger_and_points_stay_where_they_are(shown):
    tab = shown()
    before = tab.locator("#canvas").bounding_box()["width"]
    tab.locator("#zoom").fill("200")
    assert tab.locator("#canvas").bounding_box()["width"] == pytest.approx(2 * before, abs=2)
    click(tab, 20, 10)
    click(tab, 30, 12)
    np.testing.assert_allclose(json.loads(saved(tab)[1])["points"], [[[20, 10], [30, 12]]], atol=0.5)


@pytest.mark.parametrize("width", [340, 1400])
def test_it_fits_phones_and_desks_and_hostile_text_runs_nothing(shown, width):
    tab = shown(width, prompt=HOSTILE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.hacked") is None and tab.locator("#prompt").input_value() == HOSTILE
