"""What was seen of pictures is remembered as long as they are the same, and never vouches for another."""

import os
from pathlib import PurePosixPath

import pytest
from PIL import Image
from test_folder import add, captions, faults, picture

from lorakit.ground.errors import OutputError
from lorakit.ground.shards import Shards
from lorakit.pictures import inspection
from lorakit.pictures.folder import read_folder
from lorakit.pictures.names import stem

COUNT = 6


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of pictures that are many, and were last changed long ago."""
    monkeypatch.setattr(inspection, "MANY", COUNT)
    monkeypatch.setattr(inspection, "_SETTLED", 0)
    for number in range(COUNT):
        add(tmp_path / "data", f"{number}.png", picture(number))
        add(tmp_path / "data", f"{number}.txt", f"caption {number}")
    return tmp_path / "data"


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the pictures that are read."""
    names, real = [], inspection._inspected
    monkeypatch.setattr(
        inspection, "_inspected", lambda item, *args: names.append(item.name) or real(item, *args)
    )
    return names


def read(root, **options):
    return read_folder(root, remember_in=root.parent / "seen", **options)


def test_what_was_seen_is_not_read_again(root, looked_at):
    first = read(root)
    assert len(looked_at) == COUNT
    assert read(root) == first == read_folder(root)
    assert len(looked_at) == 2 * COUNT  # by the last alone, which remembers nothing
    assert len(list((root.parent / "seen").iterdir())) == 1


def test_of_few_pictures_nothing_is_written(root, monkeypatch):
    monkeypatch.setattr(inspection, "MANY", COUNT + 1)
    read(root)
    assert not (root.parent / "seen").exists()


def test_another_picture_of_the_same_size_and_time_is_seen(root, looked_at):
    file = root / "2.png"
    Image.new("RGB", (32, 24), "red").save(file, compress_level=0)
    before, was = read(root), file.stat()
    Image.new("RGB", (32, 24), "blue").save(file, compress_level=0)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    after = read(root)
    assert looked_at[COUNT:] == ["2.png"]
    assert [a.sha256 == b.sha256 for a, b in zip(before.rows, after.rows, strict=True)].count(False) == 1


def test_captions_are_never_remembered(root, looked_at):
    read(root)
    add(root, "1.txt", "caption 9")
    assert captions(read(root))["1.png"] == "caption 9" and len(looked_at) == COUNT


def test_what_changed_a_moment_ago_is_not_remembered(root, monkeypatch, looked_at):
    monkeypatch.setattr(inspection, "_SETTLED", 3600 * 10**9)
    assert read(root) == read(root) and len(looked_at) == 2 * COUNT


def test_a_header_vouches_for_no_pixels(root):
    add(root, "0.png", picture(0)[:200])  # a sound header without its pixels
    assert len(read(root, decode_limit=0).rows) == COUNT
    assert "0.png: truncated" in faults(root, remember_in=root.parent / "seen")
    assert len(read(root, decode_limit=0).rows) == COUNT


def test_a_picture_that_is_too_large_now_is_refused(root):
    read(root)
    message = faults(root, remember_in=root.parent / "seen", max_image_pixels=100)
    assert message.count("is over 100 pixels") == COUNT


def test_a_check_that_was_stopped_goes_on_where_it_was(root, looked_at, monkeypatch):
    monkeypatch.setattr(inspection, "_TOGETHER", 1)
    monkeypatch.setattr(inspection.os, "cpu_count", lambda: 1)
    real = Shards.write

    def stopped(self, name, data):
        if len(self.names) == 3:
            raise KeyboardInterrupt
        real(self, name, data)

    with monkeypatch.context() as until_then:
        until_then.setattr(Shards, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            read(root)
    looked_at.clear()
    assert read(root) == read_folder(root)
    assert looked_at[: COUNT - 3] == ["3.png", "4.png", "5.png"] and len(looked_at) == 2 * COUNT - 3


def test_a_folder_that_takes_nothing_costs_time_alone(root):
    (root.parent / "seen").write_text("a file in place of the folder")
    assert read(root) == read_folder(root)


def test_what_is_remembered_is_read_though_nothing_more_can_be_written(root, looked_at, monkeypatch):
    read(root)
    add(root, "0.png", picture(9))
    looked_at.clear()

    def full(*_):
        raise OutputError("no space left")

    monkeypatch.setattr(Shards, "write", full)
    assert read(root) == read_folder(root)
    assert looked_at[:2] == ["0.png", "0.png"] and len(looked_at) == 1 + COUNT  # the second reads all


@pytest.mark.parametrize("content", [b"", bytes(3), bytes(48 + 1)])
def test_what_another_version_remembered_is_seen_anew(root, monkeypatch, content):
    real = Shards.write
    with monkeypatch.context() as other:
        other.setattr(Shards, "write", lambda self, name, data: real(self, name, content))
        read(root)
    assert read(root) == read_folder(root)


NAMES = [
    "a.png",
    "a/b.c.png",
    "a.b/c",
    "a..png",
    "..png",
    "a.",
    "a/.png",
    "a.b/.c",
    "x/y.tar.gz",
    "a/b./c.d",
    "é.webp",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_stem_is_that_of_a_path(name):
    assert stem(name) == str(PurePosixPath(name).with_suffix(""))
