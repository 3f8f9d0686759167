"""The page of a film: its player, driven in a browser on what animate.py writes."""

import json

import numpy as np
import pytest
from pages import seen, wait_until
from PIL import Image
from small import settings_of

from lorakit.diffusion.metrics import EncoderDistance
from lorakit.diffusion.models import Base
from lorakit.ground.config import load_config
from lorakit.motion.animate_plan import make_animate_plan
from lorakit.motion.animate_report import write_outputs
from lorakit.motion.config import AnimateConfig

COLOURS = [(40 * i, 240 - 40 * i, 90) for i in range(5)]
LOSS = 12
"""Levels of 255 by which WebP may miss a colour."""


@pytest.fixture
def film(tiny_base, tmp_path):
    """The folder of five frames on a texture that pans, a square of one colour in the middle of each."""
    texture = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    frames = []
    for i, colour in enumerate(COLOURS):
        values = texture[:, 4 * i : 4 * i + 48].copy()
        values[12:36, 12:36] = colour
        frames.append(Image.fromarray(values))
    keys = {"pretrained_model_name_or_path": str(tiny_base), "prompt": "hills", "frames": len(frames)}
    keys |= {"camera": {"pan": 0.3}, "formats": ["gif"], "min_side": 48}
    plan = make_animate_plan(load_config(AnimateConfig, None, settings_of(**keys)).config)
    write_outputs(plan, tmp_path, frames, EncoderDistance(Base(plan.base)), {"seconds": 1.5})
    return tmp_path


def shown(tab):
    """The numbers of the frames whose colour is on the screen."""
    return [i for i, colour in enumerate(COLOURS) if np.abs(np.subtract(seen(tab), colour)).max() <= LOSS]


def test_the_player_steps_jumps_plays_and_stops(opened, film):
    tab = opened(film / "index.html")
    assert shown(tab) == [0] and tab.locator("#slider").get_attribute("max") == "4"
    for key, frame in (("ArrowRight", 1), ("End", 4), ("ArrowRight", 4), ("ArrowLeft", 3), ("Home", 0)):
        tab.keyboard.press(key)
        assert shown(tab) == [frame] and f"frame {frame} of 4" in tab.locator("#readout").inner_text(), key
    tab.locator("#speed").select_option("24")
    tab.locator("#play").click()
    wait_until(tab, "slider.value === '2'")
    wait_until(tab, "slider.value === '4'")
    tab.locator("#play").click()
    stopped = tab.locator("#slider").input_value()
    tab.wait_for_timeout(300)
    assert tab.locator("#slider").input_value() == stopped and shown(tab) == [int(stopped)]


def test_it_says_what_the_camera_was_to_do_and_did(opened, film):
    tab = opened(film / "index.html")
    metrics = json.loads((film / "report.json").read_text(encoding="utf-8"))["metrics"]
    said = tab.locator("body").inner_text()
    for name in ("asked", "measured", "coherence"):
        assert name in said
    assert metrics["asked"]["pan"] == pytest.approx(0.3, abs=1e-3) and 0.2 < metrics["measured"]["pan"] < 0.5
    assert tab.locator("#speed-curve svg path, #speed-curve svg polyline").count() >= 1
