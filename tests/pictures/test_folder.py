"""Every fault of a folder of pictures is found before training, with its file and line; D1 to D17."""

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lorakit.pictures.folder import DataError, Row, Table, read_folder, read_rows
from lorakit.pictures.images import load_image


def picture(seed=0, width=32, height=24):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def put(root, **files):
    """Files by name, with __ for a dot: bytes, text to write as UTF-8, or the seed of a picture."""
    for key, content in files.items():
        add(root, key.replace("__", "."), content)
    return root


def add(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture(content) if isinstance(content, int) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def row(name, text="a cat"):
    return {"file_name": name, "text": text}


def faults(root, **options):
    """The message of what `read_folder` refuses, with names relative to the folder."""
    with pytest.raises(DataError) as caught:
        read_folder(root, **options)
    return str(caught.value).replace(f"{root}/", "")


def captions(table):
    return {row.name: row.caption for row in table.rows}


@pytest.fixture
def root(tmp_path):
    """Two pictures with their lines: what every fault below is added to."""
    folder = tmp_path / "data"
    folder.mkdir()
    return put(folder, a__png=1, b__png=2, metadata__jsonl=lines(row("b.png", "two"), row("a.png", "one")))


# ---- what is right ----


def test_rows_keep_the_order_of_the_metadata(root):
    table = read_folder(root)
    assert [(r.name, r.caption, r.line) for r in table.rows] == [
        ("b.png", "two", "metadata.jsonl:1"),
        ("a.png", "one", "metadata.jsonl:2"),
    ]
    assert table.warnings == () and table.caption_source == "metadata.jsonl, key 'text'"
    first = table.rows[0]
    assert (first.width, first.height, first.path) == (32, 24, root / "b.png")
    assert len(first.sha256) == 64 and first.data is None
    assert load_image(first.source).size == (32, 24)


def test_sidecars_are_sorted_by_name_and_read_whole(tmp_path):
    put(tmp_path, b__png=1, a__png=2, b__txt=" a dog,\n\nrunning \n", a__txt="a cat")
    table = read_folder(tmp_path)
    assert [(r.name, r.caption, r.line) for r in table.rows] == [
        ("a.png", "a cat", "a.txt"),
        ("b.png", "a dog, running", "b.txt"),
    ]
    assert table.warnings == () and table.caption_source == ".txt files"


def test_suffixes_are_found_in_any_case_and_hidden_files_are_passed_over(tmp_path):
    put(tmp_path, a__PNG=1, a__TXT="a cat", __hidden__png=2, _DS_Store="x")
    add(tmp_path, ".ipynb_checkpoints/a-checkpoint.png", 3)
    add(tmp_path, "sub/.b.png", b"junk")
    assert captions(read_folder(tmp_path)) == {"a.PNG": "a cat"}


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    put(tmp_path, a__txt="a cat")
    for limit in (2000, 0):  # decoded, and by the header alone
        only = read_folder(tmp_path, decode_limit=limit).rows[0]
        assert (only.width, only.height) == (20, 40)


# ---- D1 to D17 ----


def test_d1_pictures_without_a_line_are_named(root):
    add(root, "c.png", 3)
    message = faults(root)
    assert message.startswith("c.png: 'c.png' has no caption\n") and "missing_captions" in message
    skipped = read_folder(root, missing_captions="skip")
    assert len(skipped.rows) == 2 and "1 picture(s) without a caption are left out: c.png" in skipped.warnings
    kept = read_folder(root, missing_captions="empty")
    assert captions(kept)["c.png"] == "" and "trained with an empty one: c.png" in kept.warnings[0]


def test_d2_all_missing_files_are_named_with_their_lines(root):
    put(root, metadata__jsonl=lines(row("a.png"), row("b.jpeg"), row("B.PNG"), row("none.png"), row("b.png")))
    message = faults(root)
    assert "metadata.jsonl:2: no file 'b.jpeg'; did you mean 'b.png'?" in message
    assert "metadata.jsonl:3: no file 'B.PNG'; did you mean 'b.png'?" in message
    assert "metadata.jsonl:4: no file 'none.png'\n" in message


def test_d2_a_name_in_the_other_unicode_form_is_suggested(tmp_path):
    add(tmp_path, "e\u0301.png", 1)
    put(tmp_path, metadata__jsonl=lines(row("\u00e9.png")))
    assert "did you mean 'e\u0301.png'?" in faults(tmp_path)


@pytest.mark.parametrize("again", ["a.png", "./a.png"])
def test_d3_a_picture_named_twice_gives_both_lines(root, again):
    put(root, metadata__jsonl=lines(row("a.png"), row("b.png"), row(again)))
    assert "metadata.jsonl:3: 'a.png' is already named in metadata.jsonl:1" in faults(root)


def test_d4_equal_names_in_sub_folders_stay_apart(tmp_path):
    add(tmp_path, "x/a.png", 1)
    add(tmp_path, "y/a.png", 2)
    put(tmp_path, metadata__jsonl=lines(row("x/a.png", "one"), row("y/a.png", "two")))
    table = read_folder(tmp_path)
    assert captions(table) == {"x/a.png": "one", "y/a.png": "two"}
    assert table.rows[0].sha256 != table.rows[1].sha256


def test_d4_two_pictures_with_one_caption_file_are_warned_of(tmp_path):
    put(tmp_path, a__png=1, a__webp=2, a__txt="a cat")
    table = read_folder(tmp_path)
    assert captions(table) == {"a.png": "a cat", "a.webp": "a cat"}
    assert table.warnings == ("several pictures share one caption file: a.txt",)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret.png", "'..'"),
        ("x/../../secret.png", "'..'"),
        ("x/../a.png", "'..'"),
        ("/etc/secret.png", "absolute"),
        ("C:/secret.png", "absolute"),
        ("http://host/secret.png", "URL"),
        ("file:///secret.png", "URL"),
        ("sub\\secret.png", "backslash"),
        ("a.png\0", "character"),
        ("\ud800.png", "character"),
        ("", "empty"),
        (".", "empty"),
        (7, "not text"),
        (None, "not text"),
        (["a.png"], "not text"),
    ],
)
def test_d5_a_name_that_leaves_the_folder_is_refused(root, name, why):
    add(root.parent, "secret.png", 9)
    put(root, metadata__jsonl=lines(row("a.png"), row("b.png"), row(name)))
    message = faults(root)
    assert "metadata.jsonl:3: file_name" in message and why in message
    message.encode()  # it can be printed


def test_d5_a_sibling_whose_name_begins_like_the_root_is_outside(root):
    add(root.parent / "data2", "c.png", 3)
    (root / "c.png").symlink_to(root.parent / "data2" / "c.png")
    assert "symbolic link" in faults(root, missing_captions="skip")


@pytest.mark.parametrize("whole_folder", [False, True])
@pytest.mark.parametrize("with_metadata", [False, True])
def test_d6_a_link_out_of_the_folder_is_refused_unless_allowed(tmp_path, whole_folder, with_metadata):
    outside, root = tmp_path / "outside", tmp_path / "root"
    put(outside, c__png=3)
    put(outside if whole_folder else root, c__txt="a cat")
    root.mkdir(exist_ok=True)
    name = "sub/c.png" if whole_folder else "c.png"
    if whole_folder:
        (root / "sub").symlink_to(outside)
    else:
        (root / "c.png").symlink_to(outside / "c.png")
    if with_metadata:
        put(root, metadata__jsonl=lines(row(name)))
    assert "symbolic link out of the folder" in faults(root)
    assert captions(read_folder(root, allow_symlinks=True)) == {name: "a cat"}


def test_d6_links_inside_the_folder_are_followed(root):
    (root / "c.png").symlink_to(root / "a.png")
    (root / "sub").symlink_to(root)
    put(root, metadata__jsonl=lines(row("a.png"), row("b.png"), row("c.png"), row("sub/a.png")))
    assert len(read_folder(root).rows) == 4
    assert len(read_folder(root, allow_symlinks=True).rows) == 4


@pytest.mark.parametrize("target", ["gone.png", "c.png"])
def test_d6_a_dangling_link_or_a_link_to_itself_is_a_missing_file(root, target):
    (root / "c.png").symlink_to(root / target)
    put(root, metadata__jsonl=lines(row("a.png"), row("b.png"), row("c.png")))
    assert "metadata.jsonl:3: no file 'c.png'" in faults(root)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('{"file_name": "a.png", text: "x"}', "metadata.jsonl:2:24: not JSON"),
        ('{"file_name": "a.png"', "metadata.jsonl:2:22: not JSON"),
        ("[1, 2]", "metadata.jsonl:2: not a JSON object: [1, 2]"),
        ('"a.png"', "metadata.jsonl:2: not a JSON object"),
        ("[" * 100_000, "metadata.jsonl:2: not JSON that can be read"),
        ("9" * 5000, "metadata.jsonl:2: not JSON that can be read"),
        ("x" * 500, "metadata.jsonl:2:1: not JSON, Expecting value: " + "x" * 59 + "…"),
    ],
)
def test_d7_a_broken_line_is_shown_with_its_place(root, line, where):
    put(root, metadata__jsonl=lines(row("b.png")) + line + "\n")
    message = faults(root)
    assert message.startswith(where) and "a.png' has no caption" not in message


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (
            lines(row("b.png")).encode() + b'{"file_name": "a.png", "text": "caf\xe9"}',
            "byte 0xe9 at offset 75",
        ),
        (lines(row("b.png")).encode("utf-16"), "metadata.jsonl:1: is UTF-16, not UTF-8 text (byte 0xff"),
        (b"\xef\xbb\xbf\n\n\xe9", "metadata.jsonl:3: is not UTF-8 text (byte 0xe9 at offset 5)"),
    ],
)
def test_d8_a_wrong_encoding_names_line_and_byte(root, content, where):
    put(root, metadata__jsonl=content)
    message = faults(root)
    assert where in message and "iconv" in message


def test_d8_a_caption_file_in_a_wrong_encoding_is_named(tmp_path):
    put(tmp_path, a__png=1, b__png=2, a__txt=b"one\ncaf\xe9", b__txt="fine")
    assert faults(tmp_path).startswith("a.txt:2: is not UTF-8 text (byte 0xe9 at offset 7)\n")


def test_d9_bom_crlf_blank_lines_and_line_separators_are_fine(root):
    records = [json.dumps(row("a.png", "caf\u00e9\u2028x"), ensure_ascii=False), json.dumps(row("b.png"))]
    put(root, metadata__jsonl=("\ufeff\r\n" + "\r\n\r\n".join(records)).encode())
    assert captions(read_folder(root)) == {"a.png": "caf\u00e9\u2028x", "b.png": "a cat"}
    assert read_folder(root).rows[1].line == "metadata.jsonl:4"


def test_d9_caption_files_may_have_a_bom_and_crlf(tmp_path):
    put(tmp_path, a__png=1, a__txt=b"\xef\xbb\xbfa cat\r\n")
    assert captions(read_folder(tmp_path)) == {"a.png": "a cat"}


@pytest.mark.parametrize("key", ["filename", "file", "file-name", "File_Name", "image"])
def test_d10_a_missing_file_name_suggests_the_key_that_was_meant(root, key):
    put(root, metadata__jsonl=lines(row("b.png"), {key: "a.png", "text": "x"}))
    assert f"metadata.jsonl:2: no key file_name, only {key}, text; did you mean '{key}'?" in faults(root)


def test_d10_every_line_without_file_name_is_counted(root):
    put(root, metadata__jsonl=lines(*[{"filename": f"{i}.png", "caption": "x"} for i in range(50)], {}))
    message = faults(root)
    assert message.count("no key file_name") == 20 and "(and 33 more)" in message  # 51 lines, a.png and b.png
    assert message.count("->") == 2


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        (7, "has a number for a caption: 7"),
        (0.5, "has a number for a caption: 0.5"),
        (True, "has true or false for a caption: True"),
        (["a", "b"], "has a list for a caption: ['a', 'b']"),
        ({"a": 1}, "has an object for a caption"),
        ("a\0b", "NUL"),
        ("\ud800", "half a character"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip", "empty"])
def test_d11_a_caption_that_is_no_text_is_refused(root, caption, problem, policy):
    put(root, metadata__jsonl=lines(row("b.png"), row("a.png", caption)))
    message = faults(root, missing_captions=policy)
    assert message.startswith("metadata.jsonl:2: 'a.png' has") and problem in message


@pytest.mark.parametrize(
    "record", [row("a.png", None), row("a.png", ""), row("a.png", " \n"), {"file_name": "a.png"}]
)
def test_d11_an_empty_caption_follows_the_policy(root, record):
    put(root, metadata__jsonl=lines(row("b.png"), record))
    assert faults(root).startswith("metadata.jsonl:2: 'a.png' has ")
    assert captions(read_folder(root, missing_captions="skip")) == {"b.png": "a cat"}
    assert captions(read_folder(root, missing_captions="empty")) == {"b.png": "a cat", "a.png": ""}


def test_d11_an_empty_caption_file_follows_the_policy(tmp_path):
    put(tmp_path, a__png=1, b__png=2, a__txt="\n", b__txt="fine")
    assert faults(tmp_path).startswith("a.txt: 'a.png' has an empty caption")
    assert captions(read_folder(tmp_path, missing_captions="skip")) == {"b.png": "fine"}


def test_d13_empty_metadata_has_no_rows(root):
    for content in ("", "\n \n"):
        put(root, metadata__jsonl=content)
        assert "metadata.jsonl: no rows" in faults(root)


def test_d14_a_missing_folder_and_a_file_are_told_apart(tmp_path):
    put(tmp_path, a__png=1)
    with pytest.raises(DataError, match="/no: no such folder"):
        read_folder(tmp_path / "no")
    with pytest.raises(DataError, match=r"a\.png: is a file, not a folder"):
        read_folder(str(tmp_path / "a.png"))


def test_d14_a_folder_without_pictures_says_what_was_looked_for(tmp_path):
    assert "looked for .png, .jpg" in faults(tmp_path)
    put(tmp_path, a__HEIC=b"x", b__svg="<svg/>", notes__txt="x")
    message = faults(tmp_path)
    assert "found only unsupported types (.heic, .svg)" in message and "convert them" in message


def test_pictures_without_any_caption_are_one_fault(tmp_path):
    put(tmp_path, a__png=1, b__png=2)
    message = faults(tmp_path)
    assert "2 picture(s), but neither metadata.jsonl nor .txt files" in message and message.count("\n") == 1
    put(tmp_path, a__caption="a cat")
    add(tmp_path, "sub/metadata.jsonl", "{}")
    assert "not read: a.caption, sub/metadata.jsonl" in faults(tmp_path)
    assert captions(read_folder(tmp_path, missing_captions="empty")) == {"a.png": "", "b.png": ""}
    assert "no rows are left" in faults(tmp_path, missing_captions="skip")


def test_d15_two_metadata_files_are_refused_and_csv_alone_is_not_read(root):
    put(root, metadata__csv="file_name,text\n")
    assert "metadata.csv: stands beside metadata.jsonl" in faults(root)
    (root / "metadata.jsonl").unlink()
    assert "metadata.csv: is not read; captions come from metadata.jsonl" in faults(root)


def test_caption_files_beside_metadata_are_named_as_unused(root):
    put(root, a__txt="another", readme__txt="about")
    table = read_folder(root)
    assert captions(table)["a.png"] == "one"
    assert table.warnings == ("captions come from metadata.jsonl; not read: a.txt",)


def test_a_caption_file_without_a_picture_is_named(tmp_path):
    put(tmp_path, a__png=1, a__txt="a cat", b__txt="a dog", c__caption="x")
    warnings = read_folder(tmp_path).warnings
    assert any("no picture belongs to b.txt" in warning for warning in warnings)
    assert any("not read: c.caption" in warning for warning in warnings)


def test_d16_an_edited_caption_of_equal_size_and_time_is_seen(root):
    before, times = read_folder(root), (root / "metadata.jsonl").stat()
    content = (root / "metadata.jsonl").read_text()
    put(root, metadata__jsonl=content.replace("one", "ten"))
    os.utime(root / "metadata.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    after = read_folder(root)
    assert captions(after)["a.png"] == "ten" and after.fingerprint != before.fingerprint


def test_d17_one_picture_is_enough(tmp_path):
    put(tmp_path, a__png=1, a__txt="a cat")
    assert len(read_folder(tmp_path).rows) == 1


def test_d17_beyond_the_limit_only_headers_are_read(tmp_path):
    for i in range(4):
        add(tmp_path, f"{i}.png", picture(i)[:200])  # a sound header without its pixels
        add(tmp_path, f"{i}.txt", f"caption {i}")
    message = faults(tmp_path, decode_limit=2)
    assert "0.png: truncated" in message and "1.png: truncated" in message and "2.png" not in message
    table = read_folder(tmp_path, decode_limit=0)
    assert len(table.rows) == 4 and "headers" in table.warnings[0]


def test_d17_a_large_metadata_file_is_checked_without_quadratic_work(tmp_path):
    put(tmp_path, a__png=1, metadata__jsonl=lines(*[row(f"{i}.png") for i in range(20_000)]))
    assert "(and 19981 more)" in faults(tmp_path)  # a.png has no line


# ---- the key of the caption ----


def test_the_only_other_key_with_text_is_the_caption(root):
    records = [{"file_name": n, "caption": "x", "score": 0.5} for n in ("a.png", "b.png")]
    put(root, metadata__jsonl=lines(*records))
    table = read_folder(root)
    assert captions(table) == {"a.png": "x", "b.png": "x"}
    assert table.caption_source == "metadata.jsonl, key 'caption'"


def test_two_keys_with_text_must_be_chosen_from(root):
    put(
        root,
        metadata__jsonl=lines(*[{"file_name": n, "short": "x", "long": "y"} for n in ("a.png", "b.png")]),
    )
    assert "metadata.jsonl: which key is the caption? Found: short, long" in faults(root)
    assert captions(read_folder(root, caption_column="long"))["a.png"] == "y"


def test_a_wrong_caption_column_is_corrected(root):
    assert "no line has the key 'texts'; did you mean 'text'? Found: text" in faults(
        root, caption_column="texts"
    )


def test_metadata_with_names_only_has_no_captions(root):
    put(root, metadata__jsonl=lines({"file_name": "a.png"}, {"file_name": "b.png"}))
    assert "no captions: file_name is the only key" in faults(root)


# ---- the pictures ----


def test_a_broken_picture_is_an_error_or_left_out_by_name(root):
    put(root, a__png=picture(1)[:300])
    message = faults(root)
    assert message.startswith("a.png: truncated or broken PNG") and "broken_images" in message
    table = read_folder(root, broken_images="skip")
    assert captions(table) == {"b.png": "two"}
    assert "1 broken picture(s) are left out" in table.warnings[0] and "a.png" in table.warnings[0]


def test_small_and_long_pictures_are_refused_with_their_numbers(root):
    add(root, "a.png", picture(1, 15, 40))
    add(root, "b.png", picture(2, 200, 40))
    message = faults(root)
    assert "a.png: 15x40 has a side below 16 pixels" in message
    assert "b.png: 200x40: the sides are 5.00 to 1, max_aspect is 4" in message
    assert len(read_folder(root, min_side=15, max_aspect=5).rows) == 2


def test_the_limit_on_pixels_is_passed_on(root):
    assert "32x24 is over 767 pixels" in faults(root, max_image_pixels=32 * 24 - 1)
    assert len(read_folder(root, max_image_pixels=32 * 24).rows) == 2


def test_a_mostly_transparent_picture_is_warned_of(root):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(root / "a.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save(root / "b.png")
    (warning,) = read_folder(root, alpha_background=(1, 2, 3)).warnings
    assert "mostly transparent" in warning and "(1, 2, 3)" in warning and warning.endswith(": a.png")


@pytest.mark.parametrize(("caption", "kind"), [("two", "the same caption"), ("one", "different captions")])
def test_identical_pictures_are_warned_of(root, caption, kind):
    put(root, a__png=2, metadata__jsonl=lines(row("b.png", "two"), row("a.png", caption)))
    assert read_folder(root).warnings == (f"identical pictures with {kind}: b.png = a.png",)


def test_faults_of_all_kinds_are_reported_at_once(root):
    put(root, a__png=b"junk", b__png=picture(2, 8, 8))
    put(root, metadata__jsonl=lines(row("a.png", 5), row("b.png", ""), row("none.png"), row("/x.png")))
    message = faults(root)
    for part in ("none.png", "/x.png", "a number", "an empty caption", "looks like text", "8x8"):
        assert part in message
    assert message.count("  -> ") == 6


def test_the_fingerprint_follows_pixels_captions_and_order_but_not_names(root):
    original = read_folder(root).fingerprint
    assert read_folder(root).fingerprint == original
    (root / "a.png").rename(root / "z.png")
    put(root, metadata__jsonl=lines(row("b.png", "two"), row("z.png", "one")))
    assert read_folder(root).fingerprint == original
    put(root, metadata__jsonl=lines(row("z.png", "one"), row("b.png", "two")))
    assert read_folder(root).fingerprint != original
    put(root, z__png=7, metadata__jsonl=lines(row("b.png", "two"), row("z.png", "one")))
    assert read_folder(root).fingerprint != original


# ---- rows from elsewhere ----


def test_rows_from_elsewhere_pass_the_same_checks(tmp_path):
    put(tmp_path, c__png=3)
    table = read_rows([("row 0", picture(1), " a cat "), ("row 1", tmp_path / "c.png", "a dog")])
    assert captions(table) == {"row 0": "a cat", "row 1": "a dog"}
    assert table.rows[0].path is None and table.rows[0].source == picture(1)
    assert table.rows[1].path == tmp_path / "c.png" and table.rows[1].data is None
    assert "PNG" not in repr(table)
    records = [("row 0", b"junk", "x"), ("row 1", picture(1), None), ("row 2", picture(2, 4, 4), 3)]
    with pytest.raises(DataError) as caught:
        read_rows(records)
    for part in (
        "row 0: looks like text",
        "row 1: 'row 1' has no caption",
        "row 2: 4x4",
        "row 2: 'row 2' has a number",
    ):
        assert part in str(caught.value)
    assert len(caught.value.faults) == 4
    with pytest.raises(DataError, match="no rows are left"):
        read_rows([])


def test_a_row_needs_a_source():
    empty = Row(file=None, name="a", caption="", width=1, height=1, sha256="", line="")
    with pytest.raises(AssertionError):
        _ = empty.source
    assert Table((empty,), (), "").fingerprint != Table((), (), "").fingerprint


def test_importing_folder_imports_no_torch():
    code = "import sys, lorakit.pictures.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fingerprint_is_that_of_the_checkpoints_there_are(root):
    rows = [replace(row, repeats=1 + number) for number, row in enumerate(read_folder(root).rows)]
    rows[0] = replace(rows[0], others=("ein Bär", "\u2028"), mask=root / "m.png", mask_sha256="ab")
    pairs = [
        [row.sha256, *row.captions, *([row.repeats] if row.repeats != 1 else [])]
        + ([["mask", row.mask_sha256]] if row.mask else [])
        for row in rows
    ]
    whole = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    assert Table(tuple(rows), (), "").fingerprint == whole
    assert Table((), (), "").fingerprint == hashlib.sha256(b"[]").hexdigest()
