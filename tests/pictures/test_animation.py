"""Each format opens again with the frames, the order and the durations that were asked for."""

import errno
import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from lorakit.ground.errors import OutputError
from lorakit.pictures.animation import (
    FORMATS,
    _fixed_rate,
    missing_writers,
    save_animation,
    timeline,
    upscale,
)
from lorakit.pictures.images import psnr

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
PYAV = "mp4 by PyAV"
MP4 = pytest.mark.parametrize("kind", ["mp4", PYAV], indirect=True)


def without(monkeypatch, *modules):
    """Makes find_spec miss the modules, as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else real(name))


@pytest.fixture(params=[*FORMATS, PYAV])
def kind(request, monkeypatch):
    if request.param == PYAV:
        without(monkeypatch, "imageio_ffmpeg")
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: pytest.fail("ffmpeg was used"))
    return request.param.split()[0]


def scene(count, width=64, height=48):
    """A soft gradient across which a bright disc wanders."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([x * 200 / width, y * 200 / height, 120 + 0 * x], -1)
    centres = np.linspace(8, width - 8, count)
    discs = [np.clip(8 - np.hypot(x - centre, y - height / 2), 0, 1)[..., None] for centre in centres]
    return [Image.fromarray((ground * (1 - disc) + 255 * disc).astype(np.uint8)) for disc in discs]


def reopened(path):
    """[(frame, duration in ms)]; of an MP4 the runs of its equal frames."""
    if path.suffix != ".mp4":
        with Image.open(path) as file:
            frames = [
                (frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(file)
            ]
        return frames
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        ticks = 1000 / float(video.average_rate)
        found = [(frame.to_image(), ticks) for frame in container.decode(video)]
    runs = found[:1]
    for frame, ms in found[1:]:
        last, so_far = runs[-1]
        if psnr(frame, last) > 30:  # neighbours of `scene` are far below
            runs[-1] = last, so_far + ms
        else:
            runs.append((frame, ms))
    return runs


def nearest(picture, frames):
    return max(range(len(frames)), key=lambda i: psnr(picture, frames[i]))


def test_the_scene_of_these_tests_tells_its_frames_apart():
    frames = scene(5)
    assert max(psnr(a, b) for i, a in enumerate(frames) for b in frames[:i]) < 25


@pytest.mark.parametrize("pingpong", [False, True])
def test_every_format_keeps_frames_order_and_durations(tmp_path, kind, pingpong):
    frames = scene(5)
    steps = timeline(5, fps=10, hold_ms=300, pingpong=pingpong)
    path = tmp_path / f"morph.{kind}"
    save_animation([frames[i] for i, _ in steps], path, [ms for _, ms in steps])
    found = reopened(path)
    assert [nearest(picture, frames) for picture, _ in found] == [i for i, _ in steps]
    assert [round(ms) for _, ms in found] == [ms for _, ms in steps]
    expected = [400, 100, 100, 100, 400] + [100] * 3 * pingpong
    assert [ms for _, ms in steps] == expected
    assert min(psnr(picture, frames[i]) for (picture, _), (i, _) in zip(found, steps, strict=True)) > 32
    assert os.listdir(tmp_path) == [path.name]


def test_only_apng_is_lossless_and_it_is(tmp_path):
    save_animation(scene(3), tmp_path / "a.apng", [100] * 3)
    assert [psnr(a, b) for (a, _), b in zip(reopened(tmp_path / "a.apng"), scene(3), strict=True)] == [
        np.inf
    ] * 3
    save_animation(scene(3), tmp_path / "a.webp", [100] * 3)
    assert psnr(reopened(tmp_path / "a.webp")[0][0], scene(3)[0]) < np.inf


@pytest.mark.parametrize("name", ["gif", "webp", "apng"])
def test_pictures_loop_for_ever(tmp_path, name):
    save_animation(scene(3), tmp_path / f"a.{name}", [100] * 3)
    with Image.open(tmp_path / f"a.{name}") as file:
        assert file.info["loop"] == 0
    scene(3)[0].save(tmp_path / "once.gif", save_all=True, append_images=scene(3)[1:])
    with Image.open(tmp_path / "once.gif") as file:
        assert "loop" not in file.info


def test_equal_neighbours_are_one_frame_with_the_sum_of_their_durations(tmp_path, kind):
    a, b, c = scene(3)
    path = tmp_path / f"a.{kind}"
    save_animation([a, b, b, c], path, [100, 200, 300, 400])
    assert [round(ms) for _, ms in reopened(path)] == [100, 500, 400]
    save_animation([a, b, c], path, [100, 200, 400])
    assert [round(ms) for _, ms in reopened(path)] == [100, 200, 400]


@pytest.mark.parametrize("durations", [[100, 200, 300, 680], [1280]])
@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_a_film_whose_frames_are_all_alike_keeps_its_time(tmp_path, kind, durations, size):
    frame = scene(1, *size)[0]
    path = tmp_path / f"a.{kind}"
    save_animation([frame] * len(durations), path, durations)
    found = reopened(path)
    assert abs(sum(ms for _, ms in found) - 1280) <= 10
    assert all(psnr(picture.crop((0, 0, *size)), frame) > 30 for picture, _ in found)
    if kind != "mp4":
        with Image.open(path) as file:
            assert file.size == size and file.info["loop"] == 0
    if kind == "apng":
        assert all(picture.tobytes() == frame.tobytes() for picture, _ in found)


def test_pillow_alone_would_make_still_pictures_of_alike_frames(tmp_path):
    frame = scene(1)[0]
    for name, kind in (("a.webp", "WEBP"), ("a.png", "PNG")):
        frame.save(tmp_path / name, kind, save_all=True, append_images=[frame], duration=[600, 680], loop=0)
        with Image.open(tmp_path / name) as file:
            file.load()
            assert not file.info.get("duration")


@pytest.mark.parametrize("size", [(63, 47), (1, 1), (5, 64)])
def test_odd_sizes_open_again(tmp_path, kind, size):
    frames = [Image.new("RGB", size, (level, 80, 200 - level)) for level in (0, 90, 180)]
    path = tmp_path / f"a.{kind}"
    save_animation(frames, path, [100] * 3)
    found = reopened(path)
    even = size[0] + size[0] % 2, size[1] + size[1] % 2
    assert [picture.size for picture, _ in found] == [even if kind == "mp4" else size] * 3
    assert [nearest(picture.crop((0, 0, *size)), frames) for picture, _ in found] == [0, 1, 2]


@MP4
def test_an_mp4_repeats_the_last_column_and_does_not_rescale(tmp_path, kind):
    frame = scene(1, 63, 47)[0]
    save_animation([frame], tmp_path / "a.mp4", [500])
    picture = reopened(tmp_path / "a.mp4")[0][0]
    assert psnr(picture.crop((0, 0, 63, 47)), frame) > 32
    assert psnr(picture.crop((63, 0, 64, 47)), frame.crop((62, 0, 63, 47))) > 32
    assert psnr(picture.resize((63, 47), Image.Resampling.BICUBIC), frame) < psnr(
        picture.crop((0, 0, 63, 47)), frame
    )


@MP4
def test_an_mp4_keeps_colours_that_a_wrong_matrix_would_shift(tmp_path, kind):
    colours = [(230, 30, 30), (30, 200, 40), (40, 60, 220), (255, 255, 255), (0, 0, 0)]
    save_animation([Image.new("RGB", (32, 32), each) for each in colours], tmp_path / "a.mp4", [200] * 5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
    assert {(frame.format.name, int(frame.colorspace), int(frame.color_range)) for frame in frames} == {
        ("yuv420p", 1, 1)  # 1 and 1: BT.709, limited range
    }
    for colour, frame in zip(colours, frames[::2], strict=True):
        shown = frame.to_ndarray(format="rgb24", src_colorspace=1)[16, 16].astype(int)
        wrong = frame.to_ndarray(format="rgb24", src_colorspace=5)[16, 16].astype(int)  # BT.601
        assert np.abs(shown - colour).max() <= 4
        assert len(set(colour)) == 1 or np.abs(wrong - colour).max() > 6


@pytest.mark.parametrize("fps", [7, 12, 24, 30, 60])
def test_total_time_is_right_at_any_rate(tmp_path, kind, fps):
    steps = timeline(9, fps=fps, hold_ms=250, pingpong=False)
    durations = [ms for _, ms in steps]
    assert sum(durations) == round(9000 / fps) + 500
    path = tmp_path / f"a.{kind}"
    save_animation(scene(9), path, durations)
    found = [ms for _, ms in reopened(path)]
    slack = 9 * 20 if kind == "gif" and fps == 60 else 10  # GIF shows no frame for less than 20 ms
    assert len(found) == 9 and abs(sum(found) - sum(durations)) <= slack


def test_gif_durations_are_never_so_short_that_browsers_slow_them_down(tmp_path):
    save_animation(scene(4), tmp_path / "a.gif", [3, 16, 17, 100])
    assert min(ms for _, ms in reopened(tmp_path / "a.gif")) == 20


@pytest.mark.parametrize(
    ("durations", "expected"),
    [([600, 100, 600], 10), ([250, 250], 12), ([42, 41, 42], 24), ([33, 34, 33], 30), ([17, 16, 17] * 4, 60)],
)
def test_the_rate_of_an_mp4_is_the_lowest_that_fits(durations, expected):
    rate, repeats = _fixed_rate(durations)
    assert rate == expected and len(repeats) == len(durations)
    ends = np.cumsum(durations)
    assert np.abs(np.cumsum(repeats) * 1000 / rate - ends).max() <= 2
    if rate > 10:
        assert np.abs(np.rint(ends / 100) * 100 - ends).max() > 2


def test_timelines_of_one_and_two_frames():
    assert timeline(1, fps=10, hold_ms=300, pingpong=True) == [(0, 400)]
    assert timeline(2, fps=10, hold_ms=300, pingpong=True) == [(0, 400), (1, 400)]
    assert timeline(3, fps=10, hold_ms=0, pingpong=True) == [(0, 100), (1, 100), (2, 100), (1, 100)]
    assert [i for i, _ in timeline(4, fps=10, hold_ms=0, pingpong=False)] == [0, 1, 2, 3]


def test_upscale_enlarges_small_frames_by_whole_numbers_and_leaves_others_alone():
    assert upscale(scene(2, 128, 96))[0].size == (384, 288)
    assert upscale(scene(2, 128, 128), 128)[1].tobytes() == scene(2, 128, 128)[1].tobytes()
    assert upscale(scene(1, 300, 260))[0].size == (300, 260)
    back = upscale(scene(1))[0].resize((64, 48), Image.Resampling.BOX)
    assert psnr(back, scene(1)[0]) > 35


def test_a_missing_writer_is_said_with_its_remedy(monkeypatch):
    assert missing_writers(FORMATS) == {}
    for one in ("av", "imageio_ffmpeg"):  # either will do
        with monkeypatch.context() as patch:
            without(patch, one)
            assert missing_writers(FORMATS) == {}
    without(monkeypatch, "av", "imageio_ffmpeg")
    monkeypatch.setattr("PIL.features.check", lambda name: name != "webp")
    missing = missing_writers(FORMATS)
    assert list(missing) == ["webp", "mp4"]
    assert "pip install imageio-ffmpeg" in missing["mp4"] and "pip install av" in missing["mp4"]
    assert missing_writers(["gif", "apng"]) == {}


def test_asking_for_writers_imports_none_and_no_torch():
    code = (
        "import sys, lorakit.pictures.animation as a; a.missing_writers(a.FORMATS);"
        "sys.exit(bool({'torch', 'av', 'imageio_ffmpeg'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_keeps_the_old_file_and_leaves_no_litter(tmp_path, kind, monkeypatch):
    path = tmp_path / f"a.{kind}"
    save_animation(scene(2), path, [100, 100])
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=rf"a\.{kind}: No space left.*free some space"):
            save_animation(scene(3), path, [100] * 3)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    save_animation(scene(3), path, [100] * 3)
    assert path.read_bytes() != before


def test_an_encoder_that_meets_the_limit_on_file_sizes_says_so(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        code = 9
        try:
            save_animation(scene(8), path, [100] * 8)
        except OutputError as error:
            code = 7 if "File too large" in str(error) and path.name in str(error) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("cat >/dev/null; echo 'a.mp4: No space left on device' >&2; exit 1", "free some space"),
        ("echo 'Unknown encoder libx264' >&2; exit 1", "ffmpeg failed: Unknown encoder libx264"),
        ("kill -9 $$", "ffmpeg failed: -9"),
    ],
)
def test_what_ffmpeg_says_when_it_fails_is_passed_on(tmp_path, monkeypatch, script, message):
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    with pytest.raises(OutputError, match=message):
        save_animation(scene(8, 256, 256), tmp_path / "out" / "a.mp4", [100] * 8)
    assert os.listdir(tmp_path / "out") == []


def test_mismatched_arguments_are_caught():
    for frames, durations in [([], []), (scene(2), [100]), ([*scene(1), *scene(1, 32, 32)], [100, 100])]:
        with pytest.raises(AssertionError):
            save_animation(frames, Path("never.gif"), durations)
