"""The page of a morph needs nothing but itself, shows what it is given, and moves in a real browser."""

import base64
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from pages import HOSTILE, Elements, data_of, encoded, seen, wait_until
from PIL import Image

from lorakit.film.page import morph_page

COUNT = 6
COLOURS = [(40 * i, 250 - 40 * i, 90) for i in range(COUNT)]
OTHER_COLOURS = [(250 - 40 * i, 40 * i, 200) for i in range(COUNT)]

FRAMES = [encoded(colour) for colour in COLOURS]
OTHER = [encoded(colour) for colour in OTHER_COLOURS]


def make_report(**changes):
    report = {
        "frames": [
            {
                "index": i,
                "segment": 0,
                "alpha": i / 5,
                "sharpness": 1 - 0.01 * i,
                "file": f"frames/{i:04d}.png",
            }
            for i in range(COUNT)
        ],
        "distances": [0.1, 0.2, 0.3, 0.2, 0.1],
        "metrics": {"path_length": 0.9, "endpoint_psnr": math.inf, "evenness": [1, 1.23456], "said": True},
        "definitions": {"path_length": "sum of the distances", "distance": "difference of features"},
        "images": [
            {"path": "in/a.jpg", "prompt": "a lake", "lora": "ckpt/a.safetensors"},
            {"path": "in/b.jpg", "prompt": "a hill", "lora": None},
        ],
        "settings": {"fps": 10, "steps": 50},
        "unet_evaluations": 1053,
        "seconds": 21.34,
    }
    return report | changes


# ---- the file ----


def test_every_frame_is_in_the_page_as_it_was_given():
    webp = [encoded(colour, "WEBP") for colour in COLOURS]
    data = data_of(morph_page("A morph", webp, make_report(), other=OTHER))
    for uris, given, kind in [(data["frames"], webp, "webp"), (data["other"], OTHER, "png")]:
        assert len(uris) == COUNT and all(uri.startswith(f"data:image/{kind};base64,") for uri in uris)
        assert [base64.b64decode(uri.split(",")[1]) for uri in uris] == given
    assert [row["alpha"] for row in data["rows"]] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert data["distances"] == [0.1, 0.2, 0.3, 0.2, 0.1]
    assert data_of(morph_page("A morph", FRAMES, make_report()))["other"] == []


def test_nothing_is_loaded_from_elsewhere():
    page = morph_page("A morph", FRAMES, make_report(), other=OTHER, inputs=FRAMES[:2])
    for text in ("http:", "https:", "@import", "url(", "<link", "<iframe", "import("):
        assert text not in page, text
    elements = Elements(page)
    sources = [
        attributes[key] for _, attributes in elements.found for key in ("src", "href") if key in attributes
    ]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    policy = [each["content"] for each in elements.of("meta") if "http-equiv" in each]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'; img-src data:")


def hostile_page():
    report = make_report(
        images=[{"path": f"in/{HOSTILE}", "prompt": HOSTILE, "lora": f"ckpt/{HOSTILE}"}] * 2,
        settings={"note": HOSTILE, HOSTILE: 1},
        metrics={HOSTILE: HOSTILE},
        definitions={HOSTILE: HOSTILE, "distance": HOSTILE, "sharpness": HOSTILE},
    )
    return morph_page(HOSTILE, FRAMES, report, other=OTHER, label=HOSTILE, other_label=HOSTILE)


def test_what_a_user_wrote_stays_text():
    elements, plain = Elements(hostile_page()), Elements(morph_page("A", FRAMES, make_report(), other=OTHER))
    kinds = [sorted({tag for tag, _ in each.found}) for each in (elements, plain)]
    assert kinds[0] == kinds[1] and len(elements.of("script")) == len(plain.of("script")) == 2
    assert len(elements.of("img")) == 2
    assert not [attributes for _, attributes in elements.found if "onerror" in attributes]
    assert elements.text.count(HOSTILE) >= 8  # title, heading, labels, prompts, metric, definitions
    assert elements.of("button")[1]["title"] == f"in/{HOSTILE}"
    assert data_of(hostile_page())["label"] == HOSTILE
    assert "</script>" not in elements.data and "<!--" not in elements.data
    control = Elements("<title>x</title>" + HOSTILE)
    assert len(control.of("script")) == 1 and control.of("img")


def test_missing_keys_leave_their_part_out():
    for key in make_report():
        data_of(morph_page("A morph", FRAMES, {k: v for k, v in make_report().items() if k != key}))
    bare = Elements(morph_page("A morph", FRAMES, {}))
    assert "6 frames" in bare.text and "Metrics" not in bare.text and "evaluations" not in bare.text
    full = Elements(morph_page("A morph", FRAMES, make_report()))
    assert "6 frames · 1,053 U-Net evaluations · 21.3 s" in full.text and "Metrics" in full.text
    assert data_of(morph_page("A morph", FRAMES[:1], {}))["rows"] == [
        {"alpha": None, "segment": None, "sharpness": None}
    ]


def test_values_that_json_lacks_are_shown_and_do_not_break_the_script():
    report = make_report(distances=[0.1, math.nan, math.inf, None, "x"])
    assert data_of(morph_page("A morph", FRAMES, report))["distances"] == [0.1, None, None, None, None]
    text = Elements(morph_page("A morph", FRAMES, report)).text
    for expected in ("∞", "1, 1.235", "yes", "path length", "sum of the distances", '"steps": 50'):
        assert expected in text


def test_a_second_morph_gets_its_own_curves_and_column():
    second = {
        "distances": [0.5] * 5,
        "metrics": {"path_length": 7.125},
        "frames": [{"sharpness": 0.5}] * COUNT,
    }
    page = morph_page("A morph", FRAMES, make_report(other=second), other=OTHER)
    assert data_of(page)["other_distances"] == [0.5] * 5
    assert [row["sharpness"] for row in data_of(page)["other_rows"]] == [0.5] * COUNT
    assert "7.125" in Elements(page).text
    assert "7.125" not in Elements(morph_page("A morph", FRAMES, make_report(), other=OTHER)).text


def test_each_picture_leads_to_its_frame():
    rows = [{"segment": i // 2, "alpha": (i % 2) / 2} for i in range(5)] + [{"segment": 2, "alpha": 0.9}]
    images = [{"path": f"{name}.png"} for name in "abcd"]
    elements = Elements(morph_page("A morph", FRAMES, make_report(frames=rows, images=images)))
    assert [each["data-frame"] for each in elements.of("button") if "data-frame" in each] == [
        "0",
        "2",
        "4",
        "5",
    ]
    assert data_of(morph_page("A morph", FRAMES, make_report(frames=rows)))["segments"] == 3


@pytest.mark.parametrize("frames, other", [([], []), (FRAMES, OTHER[:2]), ([b"nothing"], [])])
def test_mismatched_arguments_are_caught(frames, other):
    with pytest.raises(AssertionError):
        morph_page("A morph", frames, {}, other=other)


def test_importing_page_imports_no_torch():
    code = "import sys, lorakit.film.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- in a browser ----


def is_frame(tab, i, colours=COLOURS, where="#first img"):
    return np.abs(np.subtract(seen(tab, where), colours[i])).max() <= 3


def test_moving_the_slider_shows_another_frame(opened):
    tab = opened(morph_page("A morph", FRAMES, make_report(), other=OTHER))
    assert is_frame(tab, 0) and is_frame(tab, 0, OTHER_COLOURS, "#second img")
    still = [tab.locator("#first").screenshot() for _ in range(2)]
    tab.wait_for_timeout(300)
    assert is_frame(tab, 0) and still[0] == still[1]  # nothing moves by itself
    box = tab.locator("#slider").bounding_box()
    y = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 8, y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.6, y, steps=5)
    tab.mouse.up()
    assert tab.locator("#slider").input_value() == "3"
    assert is_frame(tab, 3) and is_frame(tab, 3, OTHER_COLOURS, "#second img") and not is_frame(tab, 0)
    assert tab.locator("#first").screenshot() != still[0]
    assert tab.locator("#readout").inner_text() == "frame 3 of 5, α 0.600"
    tab.mouse.move(box["x"] + box["width"] - 2, y)
    tab.mouse.down()
    tab.mouse.up()
    assert is_frame(tab, 5)


def test_the_keys_step_jump_and_play(opened):
    tab = opened(morph_page("A morph", FRAMES, make_report()))
    for key, frame in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5), ("ArrowRight", 5)]:
        tab.keyboard.press(key)
        assert is_frame(tab, frame), key
    tab.keyboard.press("Home")
    tab.keyboard.press("x")
    assert is_frame(tab, 0)
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowRight")
    assert is_frame(tab, 1)
    tab.keyboard.press("Space")
    wait_until(tab, "document.getElementById('slider').value === '3'")
    tab.keyboard.press("Space")
    stopped = tab.locator("#slider").input_value()
    tab.wait_for_timeout(400)
    assert tab.locator("#slider").input_value() == stopped and is_frame(tab, int(stopped))


def test_playing_goes_back_and_forth_or_round(opened):
    tab = opened(morph_page("A morph", FRAMES, make_report()))
    record = """() => { window.went = []; new MutationObserver(() => went.push(Number(slider.value)))
        .observe(document.getElementById("readout"), { childList: true }); }"""
    tab.evaluate(record)
    tab.locator("#speed").select_option("24")
    tab.locator("#play").click()
    wait_until(tab, "window.went.length >= 12")
    assert tab.locator("#play").inner_text() == "Pause"
    assert tab.evaluate("went.slice(0, 12)") == [1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1, 2]
    tab.locator("#play").click()
    tab.keyboard.press("Home")  # the button has the focus, yet the arrows and Home still work
    assert is_frame(tab, 0)
    tab.locator("#pingpong").uncheck()
    tab.evaluate("went.length = 0")
    tab.locator("#play").click()
    wait_until(tab, "window.went.length >= 7")
    assert tab.evaluate("went.slice(0, 7)") == [1, 2, 3, 4, 5, 0, 1]


def test_curves_thumbnails_and_pictures_jump(opened):
    tab = opened(morph_page("A morph", FRAMES, make_report()))
    curve = tab.locator("#speed-curve svg")
    place = {"x": curve.bounding_box()["width"] * 0.55, "y": 60}
    curve.hover(position=place)
    assert tab.locator("#speed-curve .value").inner_text() == "frames 2 → 3: 0.3"
    assert is_frame(tab, 0)  # looking does not move
    curve.click(position=place)
    assert is_frame(tab, 3)
    curve.hover(position=place)
    box = curve.bounding_box()
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60, steps=3)
    assert is_frame(tab, 5)  # dragging moves, too
    tab.mouse.up()
    dots = [tab.locator(f"#{name}-curve circle").count() for name in ("speed", "sharpness")]
    assert dots == [COUNT - 1, COUNT]
    tab.locator("#strip button").nth(4).click()
    assert is_frame(tab, 4)
    tab.locator("#inputs button").nth(0).click()
    assert is_frame(tab, 0)
    tab.locator("#inputs button").nth(1).click()
    assert is_frame(tab, 5)


def test_the_second_morph_can_be_shown_alone(opened):
    tab = opened(morph_page("A morph", FRAMES, make_report(), other=OTHER))
    states = []
    for _ in range(4):
        states.append([tab.locator(each).is_visible() for each in ("#first", "#second")])
        tab.keyboard.press("c")
    assert states == [[True, True], [True, False], [False, True], [True, True]]
    tab.get_by_label("without LoRA").check()
    assert not tab.locator("#first").is_visible() and tab.locator("#second").is_visible()
    alone = opened(morph_page("A morph", FRAMES, make_report()))
    assert not alone.locator("#second").is_visible() and not alone.locator("#views").is_visible()


def test_hostile_text_runs_nothing(opened):
    tab = opened(hostile_page())
    assert tab.evaluate("window.hacked") is None and tab.title() == HOSTILE.strip()
    tab.keyboard.press("End")
    assert is_frame(tab, 5)
    page = morph_page("MARK", FRAMES, make_report())
    control = opened(
        page.replace("MARK", "x<script>window.hacked=1</script>").replace("x<script", "<script", 1)
    )
    assert control.evaluate("window.hacked") == 1


@pytest.mark.parametrize("report", [{}, make_report(), make_report(other=make_report())])
@pytest.mark.parametrize("width", [340, 1400])
def test_it_fits_phones_and_desks_by_day_and_by_night(opened, width, report):
    grounds = []
    for scheme in ("light", "dark"):
        tab = opened(
            morph_page("A morph " + "x" * 90, FRAMES, report, other=OTHER), width, color_scheme=scheme
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        with Image.open(io.BytesIO(tab.screenshot())) as shot:
            grounds.append(shot.convert("L").getpixel((3, 3)))
    assert grounds[0] > 200 and grounds[1] < 60


def test_one_frame_is_a_page_too(opened):
    tab = opened(morph_page("A picture", FRAMES[:1], make_report()))
    tab.keyboard.press("Space")
    tab.wait_for_timeout(200)
    assert is_frame(tab, 0)
