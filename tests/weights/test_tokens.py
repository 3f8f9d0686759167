"""What the text encoder does not read is found without torch, and as the live tokenizer has it."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lorakit.weights.base import BaseError, BaseInfo, inspect_base
from lorakit.weights.tokens import overlong, unread_notes

FITS = "a photo of mountains"
LONG = "A photo of  mountains, " * 8 + "and a LAKE"


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """A copy of the tiny base, whose text encoder reads 32 tokens."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_a_text_is_cut_where_the_live_tokenizer_cuts_it(tiny_base):
    info = inspect_base(str(tiny_base))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    rng = random.Random(0)
    texts = [
        "".join(rng.choice("aAbé Éß  '!.,-01<|>\n漢🎉ñİsStT") for _ in range(length)) for length in range(80)
    ]
    found = {each.index: each for each in overlong(info, texts)}
    assert 10 < len(found) < 70
    for index, text in enumerate(texts):
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        assert (index in found) == (len(ids) > 32)
        if index in found:
            assert (found[index].tokens, found[index].limit) == (len(ids), 32)
            assert text.strip().endswith(found[index].words) and len(found[index].words) < len(text)
    assert overlong(info, texts, tokenizer) == list(found.values())


def test_what_is_lost_is_what_the_user_wrote_and_the_rest_is_read_alike(tiny_base):
    info = inspect_base(str(tiny_base))
    (lost,) = overlong(info, [FITS, LONG, ""])
    assert lost.index == 1 and lost.words.endswith(", and a LAKE")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    options = {"truncation": True, "max_length": 32}
    whole, read = (tokenizer(text, **options).input_ids for text in (LONG, LONG.removesuffix(lost.words)))
    assert whole == read
    assert whole != tokenizer(LONG.removesuffix("ountains, " + lost.words), **options).input_ids


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a " * 28 + "unmistakable lake", "unmistakable lake"),
        ("a " * 30 + "unmistakable", "unmistakable"),
        ("a, " * 15 + "lake", "lake"),
    ],
)
def test_what_is_lost_begins_with_a_word(tiny_base, text, words):
    (lost,) = overlong(inspect_base(str(tiny_base)), [text])
    assert lost.words == words


def test_a_script_without_spaces_is_cut_where_it_is(tiny_base):
    (lost,) = overlong(inspect_base(str(tiny_base)), ["漢字" * 20])
    assert 0 < len(lost.words) < 40


def test_a_note_is_said_once_for_each_text(tiny_base):
    info = inspect_base(str(tiny_base))
    assert unread_notes(info, [FITS, ""]) == []
    notes = unread_notes(info, [LONG, FITS, LONG, LONG + " again"])
    assert len(notes) == 2 and all(note.startswith("a prompt is over 32 tokens: “") for note in notes)
    assert notes[0].endswith("and a LAKE” is not read") and notes[1].endswith("and a LAKE again” is not read")


def test_the_shorter_of_tokenizer_and_text_encoder_counts(base):
    info = inspect_base(str(base))
    assert overlong(replace(info, max_tokens=20), [LONG])[0].limit == 20
    settings = base / "tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 10}))
    assert overlong(info, [LONG])[0].limit == 10 and unread_notes(info, [FITS]) == []
    settings.unlink()
    assert overlong(info, [LONG])[0].limit == 32


def test_a_tokenizer_in_two_files_is_read_too(base):
    """As Stable Diffusion 1.5 has it."""
    info, folder = inspect_base(str(base)), base / "tokenizer"
    expected = overlong(info, [LONG])
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer.json").unlink()
    assert overlong(info, [LONG]) == expected


def test_a_base_that_is_not_here_yet_says_nothing_and_a_single_file_has_clip_s_own():
    assert unread_notes(BaseInfo("some/base", "hub"), ["a lake " * 100]) == []
    single = BaseInfo("a.safetensors", "file", known=True)
    assert unread_notes(single, ["lake " * 75]) == []
    assert unread_notes(single, ["lake " * 76]) == ["a prompt is over 77 tokens: “lake” is not read"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(base, name):
    (base / "tokenizer" / name).write_text("{")
    with pytest.raises(BaseError, match="tokenizer: cannot be loaded"):
        unread_notes(inspect_base(str(base)), [FITS])


@pytest.mark.parametrize(
    ("prompt", "marks"),
    [
        ("a (red:1.3) cat, ((best quality)), [blurry]", "(red:1.3), ((best quality)), [blurry]"),
        ("a cat BREAK a dog, <lora:ink:0.8>, (blue: .5)", "BREAK, <lora:ink:0.8>, (blue: .5)"),
        ("a cat (a tabby), 10:30, breakfast, :), a < b > c, rem \\(re:zero\\), \\[x]", ""),
    ],
)
def test_marks_that_are_obeyed_elsewhere_are_said(tiny_base, prompt, marks):
    for info in (inspect_base(str(tiny_base)), BaseInfo("some/base", "hub")):  # what is not here yet too
        notes = [note for note in unread_notes(info, [prompt, prompt, "a cat"]) if "marks" in note]
        assert [note.split("here: ")[1].split("; write")[0] for note in notes] == [marks][: bool(marks)]
