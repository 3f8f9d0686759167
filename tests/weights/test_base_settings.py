"""What LoRA files say of clip skip, and what a base's header says to it."""

import pytest

from lorakit.ground.errors import UserError
from lorakit.weights.base import BaseInfo
from lorakit.weights.base_settings import asked_clip_skip, check_clip_skip, clip_skip_notes, text_layers
from lorakit.weights.tensors import serialize


def info(**config) -> BaseInfo:
    return BaseInfo("base", "folder", known=True, configs={"text_encoder": config})


@pytest.mark.parametrize(("clip_skip", "read"), [(None, 5), (1, 5), (2, 4), (5, 1)])
def test_layers_are_counted_from_the_end(clip_skip, read):
    assert text_layers(info(num_hidden_layers=5), clip_skip) == read


def test_more_than_the_header_has_is_refused_and_a_base_that_is_not_here_is_not():
    with pytest.raises(UserError, match="clip_skip 6: the text encoder of base has 5 layers"):
        check_clip_skip(info(num_hidden_layers=5), 6)
    check_clip_skip(info(num_hidden_layers=5), 5)
    check_clip_skip(BaseInfo("a/b", "hub"), 6)
    assert text_layers(info(), 2) == 11  # an old config that leaves out what CLIP has


@pytest.mark.parametrize(
    ("metadata", "asked"),
    [
        ({}, None),
        ({"ss_clip_skip": "None"}, 1),
        ({"ss_clip_skip": "1"}, 1),
        ({"ss_clip_skip": "2"}, 2),
        ({"ss_clip_skip": "many"}, None),
        ({"ss_clip_skip": "-1"}, None),
    ],
)
def test_what_a_lora_was_trained_with(metadata, asked):
    assert asked_clip_skip(metadata) == asked


def test_a_lora_that_asks_for_another_is_said(tmp_path):
    paths = {}
    for text in ("None", "2", "3", ""):
        path = tmp_path / f"{text or 'silent'}.safetensors"
        path.write_bytes(serialize({}, {"ss_clip_skip": text} if text else {}))
        paths[text] = str(path)
    assert clip_skip_notes(2, paths.values()) == [
        f"clip_skip 2, although {paths['None']} asks for 1",
        f"clip_skip 2, although {paths['3']} asks for 3",
    ]
    assert clip_skip_notes(None, [paths["None"], paths[""]]) == clip_skip_notes(1, [paths["None"]]) == []
