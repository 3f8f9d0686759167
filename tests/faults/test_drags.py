"""Faults of drags, P1 to P5: refused before torch is imported, with one message, and nothing is written."""

import base64
import io
import shutil

import numpy as np
import pytest
from harness import assert_refused, snapshot
from PIL import Image
from small import settings_of

from lorakit.pictures.painted import EMBEDDED
from lorakit.weights.tensors import read_tensors, serialize

SIZE = (24, 24)
WAY = [[8, 10], [16, 10]]


@pytest.fixture
def drag(command, tmp_path):
    """Runs drag.py on a picture of 24 pixels that the miniature sees at 96; nothing may be written."""
    Image.new("RGB", SIZE, (90, 120, 200)).save(tmp_path / "picture.png")
    (tmp_path / "empty.json").write_text("{}")

    def run(**changes):
        keys = {"image": str(tmp_path / "picture.png"), "points": [WAY], "prompt": "hills", "width": 96}
        keys |= {"height": 96, "output_dir": str(tmp_path / "out")}
        before = snapshot(tmp_path)
        result = command("drag", [str(tmp_path / "empty.json"), *settings_of(**(keys | changes))])
        assert snapshot(tmp_path) == before and not result.torch
        return result

    return run


POINTS = {
    "none": ([], "points: there are none; python drag.py --page "),
    "a handle outside": ([[[30, 4], [8, 8]]], "the handle of way 0, [30, 4], is outside of "),
    "a target outside": ([WAY, [[3, 4], [3, -1]]], "the target of way 1, [3, -1], is outside of "),
    "targets that overlap": ([WAY, [[3, 3], [17, 11]]], "the targets of ways 0 and 1 overlap, 1 pixels of "),
    "twice a handle": ([WAY, [WAY[0], [3, 3]]], "points: two ways begin at the same handle"),
    "three places": ([[[1, 2], [3, 4], [5, 6]]], "points.0: must be a list of 2"),
}


@pytest.mark.parametrize("case", POINTS)
def test_p1_points_that_cannot_be_moved_are_refused(drag, case):
    points, words = POINTS[case]
    assert_refused(drag(points=points), 2, words)


def test_p1_points_that_the_crop_or_the_mask_leaves_out_are_refused(drag, tmp_path):
    assert_refused(drag(points=[[[1, 4], [12, 8]]], width=64), 2, "the handle of way 0, [1, 4], is cut away")
    painted = np.zeros(SIZE[::-1], np.uint8)
    painted[:, :12] = 255
    Image.fromarray(painted).save(tmp_path / "half.png")
    result = drag(mask=str(tmp_path / "half.png"))
    assert_refused(result, 2, "the target of way 0, [16, 10], is outside of the mask; paint the mask over it")


def embedded(size, level):
    buffer = io.BytesIO()
    Image.new("L", size, level).save(buffer, "PNG")
    return EMBEDDED + base64.b64encode(buffer.getvalue()).decode()


MASKS = {
    "of another size": (embedded((20, 24), 255), "mask in the config: is 20x24, and "),
    "black all over": (embedded(SIZE, 0), "mask in the config: is black all over"),
    "not whole": (EMBEDDED + "A", "mask in the config: is not whole"),
    "no picture": (EMBEDDED + "AAAA", "mask in the config: "),
    "cut short": (embedded(SIZE, 255)[:-40], "mask in the config: "),
    "not there": ("no_such_mask.png", "no_such_mask.png: No such file"),
}


@pytest.mark.parametrize("case", MASKS)
def test_p2_a_mask_that_is_none_is_refused(drag, case):
    mask, words = MASKS[case]
    assert_refused(drag(mask=mask), 2, words)


def test_p3_a_lora_that_is_not_there_or_is_for_few_steps_is_refused(drag, fitted, tmp_path):
    result = drag(lora=str(tmp_path / "none.safetensors"))
    assert_refused(result, 2, "no such LoRA file", "or set lora=null")
    lora = shutil.copy(fitted[0], tmp_path / "lcm-lora.safetensors")
    (tmp_path / "lcm-lora.safetensors").write_bytes(serialize(read_tensors(lora)[0], {}))
    assert_refused(drag(lora=str(lora)), 2, "looks like a LoRA for sampling in few steps")


SETTINGS = {
    "no step is left": ({"start": 0.995}, "start 0.995 of 50 steps leaves none; lower it"),
    "no such block": ({"method": "drag", "feature_block": 3}, "feature_block 3: this U-Net has 3 up blocks"),
    "another sampler": ({"scheduler": "euler"}, "edited on the path of ddim"),
    "a method that is not offered": ({"method": "drag_lora"}, 'method: must be one of "warp", "drag"'),
    "the cache": ({"name": "cache"}, "names a folder that is in use"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_p4_settings_that_cannot_be_meant_are_refused(drag, case):
    changes, words = SETTINGS[case]
    assert_refused(drag(**changes), 2, words)


def test_p5_a_page_of_what_is_no_picture_is_refused_and_not_written(command, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    for name, words in {"broken.png": "truncated or broken", "none.png": "No such file"}.items():
        out = settings_of(output_dir=str(tmp_path / "out"))
        result = command("drag", ["--page", str(tmp_path / name), *out])
        assert_refused(result, 2, name, words)
        assert not (tmp_path / "out").exists()
