"""The caption beside a picture, from either kind of file, without its words of style."""

import json

import pytest

from lorakit.ground.errors import UserError
from lorakit.pictures.beside import caption_beside, without_style


def test_it_stands_in_metadata_or_in_a_file_of_the_picture_s_name(tmp_path):
    assert caption_beside(tmp_path / "a.png") == ("", "")
    (tmp_path / "a.txt").write_text("a lake\n at night \n")
    (tmp_path / "b.caption").write_text("a hill")
    assert caption_beside(tmp_path / "a.png") == ("a lake at night", "a.txt")
    assert caption_beside(tmp_path / "b.jpg") == ("a hill", "b.caption")
    lines = [{"file_name": "a.png", "text": "a river"}, {"file_name": "c.png", "caption": "a wood"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert caption_beside(tmp_path / "a.png") == ("a river", "metadata.jsonl")
    assert caption_beside(tmp_path / "c.png") == ("a wood", "metadata.jsonl")
    assert caption_beside(tmp_path / "b.jpg") == ("a hill", "b.caption")  # which it does not list


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"{", "metadata.jsonl:1: not JSON"),
        ("metadata.jsonl", b"[1]", "metadata.jsonl:1: not a JSON object"),
        ("a.txt", b"\xff\xfe", "a.txt: is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        caption_beside(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a photo of rocky mountains at noon", "rocky mountains at noon"),
        ("An ink drawing of a lake", "a lake"),
        ("a black and white photograph showing a house", "a house"),
        ("a stained glass window of a lake", "a lake"),
        ("pixel art of sand dunes", "sand dunes"),
        ("photo, mountains, oil painting, a lake", "mountains, a lake"),
        ("rocky mountains with a lake", "rocky mountains with a lake"),
        ("a museum of drawings", "a museum of drawings"),
        ("a lake and a painting of a ship", "a lake and a painting of a ship"),
        ("", ""),
    ],
)
def test_words_of_style_are_taken_out_and_no_others(caption, scene):
    assert without_style(caption) == scene
