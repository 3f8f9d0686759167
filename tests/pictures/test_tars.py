"""Pictures in tar files are those of a folder; what is torn, nameless or named twice is told by file."""

import io
import json
import tarfile

import pytest
from test_folder import add, captions, faults, picture

from lorakit.pictures import inspection
from lorakit.pictures.folder import read_folder
from lorakit.pictures.tars import Member


def packed(members, **options) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", **options) as archive:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def sample(number, key=None, ending=".png"):
    key = f"{number:04d}" if key is None else key
    return [(f"{key}{ending}", picture(number)), (f"{key}.txt", f"caption {number}")]


@pytest.fixture
def root(tmp_path):
    """Six pictures in two tar files, of two formats, one in a sub-folder."""
    first = [part for number in range(4) for part in sample(number)]
    add(tmp_path / "data", "a.tar", packed(first, format=tarfile.GNU_FORMAT))
    add(
        tmp_path / "data",
        "more/b.tar",
        packed(sample(4, f"./{'long/' * 30}x.y/4") + sample(5), format=tarfile.PAX_FORMAT),
    )
    return tmp_path / "data"


def test_pictures_of_tar_files_are_those_of_a_folder(root, tmp_path):
    table = read_folder(root)
    assert [row.name for row in table.rows[:4]] == [f"a.tar/{number:04d}.png" for number in range(4)]
    assert table.rows[4].name == f"more/b.tar/./{'long/' * 30}x.y/4.png"
    for number in range(6):
        add(tmp_path / "loose", f"{number}.png", picture(number))
        add(tmp_path / "loose", f"{number}.txt", f"caption {number}")
    loose = read_folder(tmp_path / "loose")
    assert table.fingerprint == loose.fingerprint and not table.warnings
    assert [row.source for row in table.rows] == [picture(number) for number in range(6)]
    assert [(row.width, row.height) for row in table.rows] == [(row.width, row.height) for row in loose.rows]
    assert table.rows[2].line == "a.tar/0002.txt" and table.caption_source == ".txt in 2 tar file(s)"
    assert read_folder(root / "a.tar").rows[1] == table.rows[1]


def test_a_caption_is_taken_from_json_by_its_key(tmp_path):
    records = [json.dumps({"caption": f"hills {number}", "url": "x"}) for number in range(2)]
    members = [(f"{n}.jpg", picture(n)) for n in range(2)] + [(f"{n}.json", records[n]) for n in range(2)]
    add(tmp_path, "a.tar", packed(members))
    assert captions(read_folder(tmp_path, caption_column="caption")) == {
        "a.tar/0.jpg": "hills 0",
        "a.tar/1.jpg": "hills 1",
    }
    message = faults(tmp_path, caption_column="text")
    assert (
        "a.tar: 1.json: has no key 'text', only caption, url" in message
        and "correct caption_column" in message
    )
    assert "no .txt beside any" in faults(tmp_path) and "caption_column" in faults(tmp_path)
    add(tmp_path, "a.tar", packed([*members[:3], ("1.json", "{")]))
    assert "1.json: is not JSON" in faults(tmp_path, caption_column="caption")


def test_every_cut_of_a_tar_file_is_told(tmp_path):
    """Up to the first of the two blocks that end it; what lies behind that says nothing."""
    whole = packed([part for number in range(3) for part in sample(number)])
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        *_, last = archive.getmembers()
    end = last.offset_data + 512
    assert whole[end : end + 1024] == bytes(1024)
    add(tmp_path, "a.tar", whole[: end + 512])
    assert len(read_folder(tmp_path).rows) == 3
    for cut in [0, 1, 511, 512, 700, 1024, end - 600, end - 512, end - 1, end, end + 511]:
        add(tmp_path, "a.tar", whole[:cut])
        message = faults(tmp_path)
        assert "a.tar: " in message and "copy or download it again" in message, cut
    add(tmp_path, "a.tar", whole[: end - 1024] + b"x" * 512 + whole[end - 512 :])
    assert "is cut short or damaged behind byte" in faults(tmp_path)


def test_a_picture_without_a_caption_is_named_or_treated_as_asked(tmp_path):
    add(tmp_path, "a.tar", packed([*sample(0), ("20_cats/1.png", picture(1)), ("2.txt", "nothing")]))
    message = faults(tmp_path)
    assert "'a.tar/20_cats/1.png' has no caption" in message and "missing_captions" in message
    assert len(read_folder(tmp_path, missing_captions="skip").rows) == 1
    assert captions(read_folder(tmp_path, missing_captions="empty"))["a.tar/20_cats/1.png"] == ""
    table = read_folder(tmp_path, missing_captions="folder")
    assert captions(table)["a.tar/20_cats/1.png"] == "cats"
    assert any("a.tar: no picture belongs to 2.txt" in warning for warning in table.warnings)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([("0000.png", picture(7))], "'0000.png' is there twice"),
        ([("0000.txt", "another")], "'0000.txt' is there twice"),
        ([("0000.jpg", picture(7))], "two pictures have the name '0000': 0000.png, 0000.jpg"),
    ],
)
def test_a_name_that_repeats_is_told(tmp_path, more, told):
    add(tmp_path, "a.tar", packed([*sample(0), *more]))
    message = faults(tmp_path)
    assert told in message and "a name of its own" in message


def test_equal_names_in_two_tar_files_stay_apart(tmp_path):
    add(tmp_path, "a.tar", packed(sample(0)))
    add(tmp_path, "b.tar", packed(sample(1, "0000")))
    assert captions(read_folder(tmp_path)) == {"a.tar/0000.png": "caption 0", "b.tar/0000.png": "caption 1"}


def test_what_is_no_picture_of_a_sample_is_passed_over(tmp_path):
    more = [(".hidden.png", b"x"), ("0000.seg.png", b"x"), ("0000.cls", "3"), ("__index__", "x")]
    add(tmp_path, "a.tar", packed(sample(0) + more))
    assert captions(read_folder(tmp_path)) == {"a.tar/0000.png": "caption 0"}


def test_other_faults_of_members_are_told_with_their_names(tmp_path):
    bad = [
        ("1.png", b"no picture"),
        ("1.txt", "text"),
        ("2.png", picture(2)),
        ("2.txt", "Bär".encode("latin-1")),
    ]
    add(tmp_path, "a.tar", packed(sample(0) + bad))
    message = faults(tmp_path)
    assert "a.tar/1.png: looks like text" in message and "a.tar: 2.txt: is not UTF-8 text" in message
    add(tmp_path, "a.tar.gz", b"\x1f\x8b")
    assert "a.tar.gz: is compressed" in faults(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    add(tmp_path, "a.tar", packed([("a.bin", b"x")]))
    assert "no pictures in 1 tar file(s)" in faults(tmp_path)


def test_loose_pictures_are_read_and_a_tar_file_beside_them_is_said(root):
    add(root, "0.png", picture(0))
    add(root, "0.txt", "a cat")
    table = read_folder(root)
    assert captions(table) == {"0.png": "a cat"}
    assert any("none is read: a.tar, more/b.tar" in warning for warning in table.warnings)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    add(tmp_path / "other", "a.tar", packed(sample(0)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.tar").symlink_to(tmp_path / "other/a.tar")
    assert "symbolic link out of the folder" in faults(tmp_path / "data")
    assert len(read_folder(tmp_path / "data", allow_symlinks=True).rows) == 1


def test_what_was_seen_of_members_is_remembered_until_their_file_changes(root, monkeypatch):
    monkeypatch.setattr(inspection, "MANY", 1)
    monkeypatch.setattr(inspection, "_SETTLED", 0)
    read, real = [], Member.__call__
    monkeypatch.setattr(Member, "__call__", lambda self: read.append(self.archive) or real(self))
    first = read_folder(root, remember_in=root.parent / "seen")
    assert len(read) == 6
    assert read_folder(root, remember_in=root.parent / "seen") == first and len(read) == 6
    content = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(content)
    assert read_folder(root, remember_in=root.parent / "seen") == first and len(read) == 10
