"""Repeats by folder, captions by the line, tags in other orders, trigger words."""

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from lorakit.ground.errors import UserError
from lorakit.pictures.folder import DataError, Table, read_folder, read_rows
from lorakit.pictures.wording import tag_orders, triggered, with_repeats, with_wording


def add(root: Path, name: str, caption: str | None = "a ridge", ending: str = ".txt") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(map(ord, name)) % 256
    Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(ending).write_text(caption)


def repeats_of(table: Table) -> dict[str, int]:
    return {row.name: row.repeats for row in table.rows}


def captions_of(table: Table) -> dict[str, tuple[str, ...]]:
    return {row.name: row.captions for row in table.rows}


# ---- repeats ----


@pytest.fixture
def nested(tmp_path) -> Table:
    for name in ("20_zwx ridge/a.png", "1_ridge/b.png", "plain/3_x/c.png", "3_y/in/d.png", "e.png"):
        add(tmp_path, name)
    return read_folder(tmp_path)


def test_the_nearest_folder_with_a_number_counts(nested):
    assert repeats_of(with_repeats(nested, "kohya")) == {
        "1_ridge/b.png": 1,
        "20_zwx ridge/a.png": 20,
        "3_y/in/d.png": 3,
        "e.png": 1,
        "plain/3_x/c.png": 3,
    }


def test_the_innermost_folder_that_is_named_counts(nested):
    found = repeats_of(with_repeats(nested, {".": 2, "plain": 5, "3_y/": 7, "plain/3_x": 4}))
    assert list(found.values()) == [2, 2, 7, 2, 4]
    assert set(repeats_of(with_repeats(nested, None)).values()) == {1}


def test_folders_with_numbers_are_said_where_nothing_is_asked(nested):
    (said,) = with_repeats(nested, None).warnings
    assert "20_zwx ridge, 3_x, 3_y" in said and 'set repeats to "kohya"' in said
    assert with_repeats(nested, {"plain": 2}).warnings == ()


def test_numbers_that_no_folder_has_are_said(nested, tmp_path):
    add(tmp_path / "flat", "a.png")
    (said,) = with_repeats(read_folder(tmp_path / "flat"), "kohya").warnings
    assert "no effect" in said and with_repeats(nested, "kohya").warnings == ()


def test_a_folder_without_pictures_is_refused_with_those_there_are(nested):
    with pytest.raises(UserError, match=r"no picture lies in ridge; the folders are \., 1_ridge"):
        with_repeats(nested, {"ridge": 2})


def test_a_zero_leaves_out_and_says_so(tmp_path):
    add(tmp_path, "0_old/a.png")
    with pytest.raises(UserError, match="every folder has 0"):
        with_repeats(read_folder(tmp_path), "kohya")
    add(tmp_path, "2_new/b.png")
    table = with_repeats(read_folder(tmp_path), "kohya")
    assert (
        repeats_of(table) == {"2_new/b.png": 2}
        and "left out by a folder's 0: 0_old/a.png" in table.warnings[0]
    )


def test_repeats_are_part_of_the_fingerprint(nested):
    prints = [with_repeats(nested, asked).fingerprint for asked in (None, "kohya", {"plain": 2})]
    assert len(set(prints)) == 3 and prints[0] == nested.fingerprint


# ---- several captions ----


def test_lines_are_one_caption_or_several(tmp_path):
    add(tmp_path, "a.png", " a photo  of mountains\n\nan ink drawing\n")
    joined = read_folder(tmp_path)
    assert captions_of(joined) == {"a.png": ("a photo of mountains an ink drawing",)} and not joined.warnings
    told = read_folder(tmp_path, caption_lines=None)
    assert captions_of(told) == captions_of(joined) and "a.txt; for one line at a time" in told.warnings[0]
    table = read_folder(tmp_path, caption_lines="choice")
    assert captions_of(table) == {"a.png": ("a photo of mountains", "an ink drawing")}
    assert table.fingerprint != joined.fingerprint and not table.warnings


def test_a_list_is_several_captions_or_refused_with_what_to_do(tmp_path):
    add(tmp_path, "a.png", None)
    line = {"file_name": "a.png", "text": ["one", "two\nthree", "one", " "]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match='set caption_lines to "choice"'):
        read_folder(tmp_path, caption_lines=None)
    assert captions_of(read_folder(tmp_path, caption_lines="choice")) == {"a.png": ("one", "two", "three")}
    for bad, what in (([7], "a number"), (["x", ["y"]], "a list"), (["a\0"], "NUL")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"text": bad}))
        with pytest.raises(DataError, match=what):
            read_folder(tmp_path, caption_lines="choice")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"text": ["", " "]}))
    with pytest.raises(DataError, match="an empty caption"):
        read_folder(tmp_path, caption_lines="choice")


def test_lists_of_a_data_set_are_read_alike(tmp_path):
    add(tmp_path, "a.png", None)
    table = read_rows([("row 0", tmp_path / "a.png", ["one", "two"])], caption_lines="choice")
    assert captions_of(table) == {"row 0": ("one", "two")}
    with pytest.raises(DataError, match="has a list"):
        read_rows([("row 0", tmp_path / "a.png", ["one", "two"])])


def test_caption_files_of_another_ending(tmp_path):
    add(tmp_path, "a.png", "a ridge", ".caption")
    with pytest.raises(DataError, match='caption_extension ".caption" reads these'):
        read_folder(tmp_path)
    table = read_folder(tmp_path, caption_extension=".caption")
    assert captions_of(table) == {"a.png": ("a ridge",)} and table.caption_source == ".caption files"
    add(tmp_path, "b.png", "a lake", ".txt")
    with pytest.raises(DataError, match=r"'b.png' has no caption"):
        read_folder(tmp_path, caption_extension=".caption")


def test_a_folder_names_what_has_no_caption(tmp_path):
    add(tmp_path, "20_zwx ridge/a.png", None)
    add(tmp_path, "class/b.png", " ")
    add(tmp_path, "class/c.png", "its own")
    table = read_folder(tmp_path, missing_captions="folder")
    assert captions_of(table) == {
        "20_zwx ridge/a.png": ("zwx ridge",),
        "class/b.png": ("class",),
        "class/c.png": ("its own",),
    }
    assert "trained with the name of their folder: 20_zwx ridge/a.png, class/b.png" in table.warnings[0]
    add(tmp_path, "d.png", None)
    add(tmp_path, "5_/e.png", None)
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path, missing_captions="folder")
    assert len(caught.value.faults) == 2 and "lies in no folder that has a name" in str(caught.value)


# ---- tags and trigger words ----


def test_orders_keep_the_tags_and_the_first_of_them_in_place():
    orders = tag_orders("zwx, ridge, lake , snow", 1, 50)
    assert orders[0] == "zwx, ridge, lake , snow" and len(set(orders)) == len(orders)
    assert {order.split(", ")[0] for order in orders} == {"zwx"}
    assert len(orders) == 6
    assert {tuple(part.strip() for part in order.split(",")[1:]) for order in orders} == set(
        itertools.permutations(("ridge", "lake", "snow"))
    )
    assert orders == tag_orders("zwx, ridge, lake , snow", 1, 50)
    assert len(tag_orders("a, b, c, d, e, f", 0, 16)) == 16


@pytest.mark.parametrize(
    ("caption", "keep"), [("a photo of a ridge", 0), ("a, b", 1), ("a,,", 0), ("a, b", 9)]
)
def test_what_has_no_two_tags_to_move_stays(caption, keep):
    assert tag_orders(caption, keep, 16) == [caption]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a ridge", "zwx, a ridge"),
        ("a photo of zwx", "a photo of zwx"),
        ("zwxy, a ridge", "zwx, zwxy, a ridge"),
        ("a photo of [trigger] at dawn", "a photo of zwx at dawn"),
        ("", "zwx"),
    ],
)
def test_the_trigger_word_is_in_each_caption_once(caption, expected):
    assert triggered(caption, "zwx") == expected


def test_wording_goes_over_all_captions_and_says_where_it_does_nothing(tmp_path):
    add(tmp_path, "a.png", "b, c\nd, e")
    table = read_folder(tmp_path, caption_lines="choice")
    options = {"keep_tokens": 0, "orders": 16}
    (row,) = with_wording(table, shuffle=True, trigger="zwx", **options).rows
    assert row.caption == "zwx, b, c" and set(row.others) == {"zwx, c, b", "zwx, d, e", "zwx, e, d"}
    assert with_wording(table, shuffle=False, trigger=None, **options) == table
    add(tmp_path, "a.png", "plain words")
    plain = read_folder(tmp_path)
    assert "no caption has tags" in with_wording(plain, shuffle=True, trigger=None, **options).warnings[0]
