"""Clips from users: which are found, in which order their frames come, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.ground.errors import UserError
from lorakit.pictures import clips
from lorakit.pictures.animation import save_animation
from lorakit.pictures.captions import DataError
from lorakit.pictures.clips import clip_frames, read_clips

RULES = dict(
    caption_column=None,
    caption_extension=".txt",
    caption_lines="join",
    missing_captions="error",
    allow_symlinks=False,
    max_image_pixels=10_000,
    max_aspect=4.0,
)


def read(folder: Path, frames: int = 3, stride: int = 1, **rules):
    return read_clips(folder, frames=frames, stride=stride, **(RULES | rules))


def shades(count: int, size=(24, 16)) -> list[Image.Image]:
    """Frame k is of one grey, 16 k."""
    return [Image.new("RGB", size, (16 * k,) * 3) for k in range(count)]


def write_folder(folder: Path, frames: list[Image.Image]) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        frame.save(folder / f"frame{number}.png")
    return folder


@pytest.fixture
def films(tmp_path) -> Path:
    """The same twelve frames as a folder, a GIF and a WebP, with captions beside them."""
    root = tmp_path / "films"
    write_folder(root / "a", shades(12))
    for kind in ("gif", "webp"):
        save_animation(shades(12), root / f"{kind}.{kind}", [100] * 12)
    for name in ("a", "gif", "webp"):
        (root / f"{name}.txt").write_text(f"a film called {name}")
    return root


def levels(path: Path, *part: int) -> list[int]:
    frames = clip_frames(path, *part, max_pixels=10_000)
    return [round(float(np.asarray(frame).mean()) / 16) for frame in frames]


def test_every_kind_of_clip_has_its_frames_in_order_and_its_caption(films):
    table = read(films)
    assert [(row.name, row.caption, row.frames) for row in table.rows] == [
        ("a", "a film called a", 12),
        ("gif.gif", "a film called gif", 12),
        ("webp.webp", "a film called webp", 12),
    ]
    for row in table.rows:
        assert (row.width, row.height) == (24, 16) and row.path is not None
        assert levels(row.path, 0, 12, 1) == [*range(12)]  # 10 and 11 come after 9
        assert levels(row.path, 1, 3, 4) == [1, 5, 9]
    assert len({row.sha256 for row in table.rows}) == 3


def test_captions_come_from_metadata_too_by_the_name_of_a_folder(films):
    lines = [{"file_name": name, "text": f"{name} of metadata"} for name in ("a", "gif.gif", "webp.webp")]
    (films / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.caption for row in read(films).rows] == [line["text"] for line in lines]
    (films / "metadata.jsonl").write_text(json.dumps({"file_name": "b", "text": "none"}))
    with pytest.raises(DataError, match="no file 'b'"):
        read(films)


def test_the_content_of_frames_names_a_clip_and_their_names_do_not(films, tmp_path):
    same = write_folder(tmp_path / "other/b", shades(12))
    other = write_folder(tmp_path / "other/c", shades(12)[::-1])
    for folder in (same, other):
        folder.with_suffix(".txt").write_text("x")
    a, (b, c) = read(films).rows[0], read(tmp_path / "other").rows
    assert a.sha256 == b.sha256 != c.sha256


def test_mp4_is_read_where_a_codec_is_and_else_the_remedy_is_told(tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    save_animation(shades(8, (32, 32)), tmp_path / "film.mp4", [100] * 8)
    (tmp_path / "film.txt").write_text("a film")
    (row,) = read(tmp_path).rows
    assert row.frames == 8 and (row.width, row.height) == (32, 32) and row.path is not None
    assert levels(row.path, 0, 4, 2) == [0, 2, 4, 6]
    (tmp_path / "film.mp4").write_bytes(b"no film at all" * 9)
    with pytest.raises(DataError, match=r"film.mp4: .*cannot be decoded"):
        read(tmp_path)
    monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="MP4, which needs ffmpeg: pip install imageio-ffmpeg"):
        read(tmp_path)


def spoil_one_frame(root: Path) -> None:
    for path in list((root / "a").iterdir())[1:]:
        path.unlink()


def spoil_size(root: Path) -> None:
    Image.new("RGB", (25, 16)).save(root / "a/frame7.png")


def spoil_length(root: Path) -> None:
    save_animation(shades(12)[:2], root / "gif.gif", [100] * 2)


def spoil_caption(root: Path) -> None:
    (root / "webp.txt").unlink()


def spoil_root(root: Path) -> None:
    Image.new("RGB", (24, 16)).save(root / "still.png")


def spoil_shape(root: Path) -> None:
    save_animation(shades(12, (90, 16)), root / "gif.gif", [100] * 12)


SPOILS = {
    "one frame": (spoil_one_frame, r"films/a: has one frame, and nothing moves\n.*motion.camera"),
    "another size": (spoil_size, r"films/a: its frames differ in size: 24x16 and 25x16"),
    "too short": (spoil_length, r"gif.gif: has 2 frames\n.*lower motion.frames.*which need 3 frames"),
    "no caption": (spoil_caption, "webp.webp"),
    "a still": (spoil_root, r"still.png: a still stands among the clips\n.*data_dir"),
    "too wide": (spoil_shape, "max_aspect is 4"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_clip_that_cannot_be_used_is_named_with_the_remedy(films, name):
    spoil, words = SPOILS[name]
    spoil(films)
    with pytest.raises(DataError, match=words):
        read(films)


def test_one_long_file_is_to_be_cut_and_every_fault_is_told_at_once(films, monkeypatch):
    monkeypatch.setattr(clips, "LONGEST", 11)
    with pytest.raises(DataError, match="cut it into clips") as caught:
        read(films)
    assert len(caught.value.faults) == 3
    monkeypatch.setattr(clips, "LONGEST", 12)
    assert len(read(films).rows) == 3


def test_a_folder_without_clips_says_what_clips_are(tmp_path):
    with pytest.raises(DataError, match=r"no clips here: no folders of frames, no .gif, .webp, .mp4"):
        read(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "nowhere")
