"""Animations of morphs: GIF, WebP, APNG and MP4, with a duration for each frame. Imports no torch.

Equal neighbouring frames become one with their summed duration in GIF, WebP and APNG, so what plays is as
asked, also where all are alike, and fewer frames than were given may be counted in the file.
"""

import importlib.util
import io
import math
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, features

from lorakit.ground.errors import OutputError
from lorakit.ground.publish import REMEDIES, publish_file

FORMATS = ("gif", "webp", "apng", "mp4")
_H264 = {"crf": "16", "preset": "slow"}
_ANIMATED = 2  # bit of a WebP's first chunk
_MP4_RATES = range(10, 61)  # some players stumble below


def missing_writers(formats: Iterable[str]) -> dict[str, str]:
    """Format -> why it cannot be written here, with the remedy; empty if all can."""
    reasons = {}
    if not features.check("webp"):
        reasons["webp"] = "this Pillow was built without WebP: pip install --force-reinstall pillow"
    if not any(map(importlib.util.find_spec, ("imageio_ffmpeg", "av"))):
        reasons["mp4"] = "MP4 needs ffmpeg: pip install imageio-ffmpeg, or pip install av"
    return {name: reasons[name] for name in formats if name in reasons}


def timeline(count: int, *, fps: float, hold_ms: int, pingpong: bool) -> list[tuple[int, int]]:
    """(frame index, duration in ms) in the order of playback.

    Args:
        hold_ms: by which the first and the last frame stay longer.
        pingpong: goes back through the inner frames, so that the loop has no jump.
    """
    order = [*range(count), *(range(count - 2, 0, -1) if pingpong else ())]
    ends = [round(position * 1000 / fps) for position in range(len(order) + 1)]
    held = {0, count - 1}
    return [
        (i, end - start + hold_ms * (i in held))
        for i, (start, end) in zip(order, pairwise(ends), strict=True)
    ]


def upscale(frames: Sequence[Image.Image], min_side: int = 256) -> list[Image.Image]:
    """The frames, by LANCZOS a whole number of times larger if their shorter side is below `min_side`."""
    factor = math.ceil(min_side / min(frames[0].size))
    if factor == 1:
        return list(frames)
    return [
        frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.LANCZOS)
        for frame in frames
    ]


def save_animation(frames: Sequence[Image.Image], path: Path, durations: Sequence[int]) -> None:
    """Write frames of one size as an endless loop (an MP4 plays once); the suffix of `path` names the format.

    Args:
        durations: of each frame in ms. GIF rounds the times of change to 10 ms and shows no frame for less
            than 20, MP4 rounds them to 1/60 s or better; the sum is right but for GIF frames below 20 ms.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the MP4 encoder failed.
    """
    assert frames and len(frames) == len(durations), f"{len(frames)} frames, {len(durations)} durations"
    assert len({frame.size for frame in frames}) == 1, "frames of different sizes"
    frames = [frame.convert("RGB") for frame in frames]
    publish_file(path, _WRITERS[path.suffix.removeprefix(".").lower()](frames, durations))


def _gif(frames: Sequence[Image.Image], durations: Sequence[int]) -> bytes:
    """A palette per frame and no dithering, which is the closest and the calmest.

    A cross-fade of two mountains, 16 frames of 128 x 128; mean PSNR, size, and RMS by which the error changes
    from frame to frame (flicker). Palette per frame: 42.7 dB, 187 KiB, 2.2; dithered: 40.5 dB, 198 KiB, 3.1.
    One palette for all: 38.1 dB, 155 KiB, 3.6; dithered: 37.3 dB, 172 KiB, 4.5. Pillow's own: 40.7 dB,
    221 KiB, 2.6. Dithering grains skies, and it crawls. A frame takes 0.05 s, one of 512 x 512 takes 0.6 s.
    """
    ends = [round(end / 10) for end in accumulate(durations)]
    # Browsers play 10 ms and less as 100 ms.
    durations = [max(20, 10 * (end - start)) for start, end in pairwise([0, *ends])]
    palettes = [frame.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1) for frame in frames]
    return _by_pillow(palettes, durations, "GIF", optimize=False)


def _by_pillow(frames: Sequence[Image.Image], durations: Sequence[int], kind: str, **options: Any) -> bytes:
    # In memory first: Pillow's encoders lose the errno of a full disk.
    buffer = io.BytesIO()
    frames[0].save(
        buffer, kind, save_all=True, append_images=frames[1:], duration=list(durations), loop=0, **options
    )
    return buffer.getvalue()


def _webp(frames: Sequence[Image.Image], durations: Sequence[int]) -> bytes:
    data = _by_pillow(frames, durations, "WEBP", quality=95, method=4)
    is_animated = data[12:16] == b"VP8X" and bool(data[20] & _ANIMATED)
    return data if is_animated else _webp_of_one(data, frames[0].size, sum(durations))


def _webp_of_one(still: bytes, size: tuple[int, int], duration: int) -> bytes:
    """An animation of one frame, which libwebp makes a still picture of: it would have no time.

    Args:
        still: a WebP file; `duration` in ms.

    Source: WebP Container Specification, chunks VP8X, ANIM and ANMF.
    """

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)

    picture = still[12:] if still[12:16] != b"VP8X" else still[30:]
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    frame = bytes(6) + sides + duration.to_bytes(3, "little") + b"\0" + picture
    body = b"WEBP" + chunk(b"VP8X", bytes([_ANIMATED, 0, 0, 0]) + sides)
    return chunk(b"RIFF", body + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame))


def _apng(frames: Sequence[Image.Image], durations: Sequence[int]) -> bytes:
    data = _by_pillow(frames, durations, "PNG")
    if b"acTL" in data[:64]:
        return data
    # Pillow makes one frame a still picture, which has no time; it merges none that are blended unlike.
    half = sum(durations) // 2
    return _by_pillow([frames[0]] * 2, [half, sum(durations) - half], "PNG", blend=[0, 1])


def _mp4(frames: Sequence[Image.Image], durations: Sequence[int]) -> bytes | Callable[[Path], None]:
    """H.264 in yuv420p, which every browser plays, at a fixed rate: longer frames are repeated."""
    rate, repeats = _fixed_rate(durations)
    frames = [_padded_to_even(frame) for frame in frames]
    stream = (frame for frame, times in zip(frames, repeats, strict=True) for _ in range(times))
    encode = _mp4_by_ffmpeg if importlib.util.find_spec("imageio_ffmpeg") else _mp4_by_pyav
    return partial(encode, stream, rate, frames[0].size)


def _fixed_rate(durations: Sequence[int]) -> tuple[int, list[int]]:
    """(rate, repeats of each frame): the lowest rate within 2 ms at every change of frame, or the closest."""
    ends = list(accumulate(durations))

    def error(rate: int) -> float:
        return max(abs(round(end * rate / 1000) * 1000 / rate - end) for end in ends)

    rate = min(_MP4_RATES, key=lambda rate: max(error(rate), 2))
    return rate, [end - start for start, end in pairwise([0, *(round(end * rate / 1000) for end in ends)])]


def _padded_to_even(frame: Image.Image) -> Image.Image:
    """4:2:0 has no odd sizes: the last column or row is repeated."""
    pad = ((0, frame.height % 2), (0, frame.width % 2), (0, 0))
    return Image.fromarray(np.pad(np.asarray(frame), pad, mode="edge"))


def _mp4_by_ffmpeg(stream: Iterator[Image.Image], rate: int, size: tuple[int, int], path: Path) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", "{}x{}".format(*size), "-r", str(rate), "-i", "-", "-c:v", "libx264"]
    command += [part for key, value in _H264.items() for part in (f"-{key}", value)]
    # Without the tags players guess the matrix from the size of the picture.
    command += ["-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p", "-colorspace", "bt709"]
    command += ["-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    command += ["-movflags", "+faststart", str(path)]
    # restore_signals=False: past a limit on file sizes ffmpeg then reports instead of being killed.
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "restore_signals": False}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **pipes) as process:
        assert process.stdin and process.stderr
        _feed(stream, process.stdin)
        said = process.stderr.read().decode("utf-8", "replace").strip()
    if process.returncode:
        for code in REMEDIES:
            if os.strerror(code) in said:
                raise OSError(code, said)
        raise OutputError(f"the MP4 was not written, ffmpeg failed: {said or process.returncode}")


def _feed(stream: Iterator[Image.Image], pipe: IO[bytes]) -> None:
    try:
        with pipe:
            for frame in stream:
                pipe.write(frame.tobytes())
    except BrokenPipeError:  # ffmpeg ended first; its own words say why
        pass


def _mp4_by_pyav(stream: Iterator[Image.Image], rate: int, size: tuple[int, int], path: Path) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        video = container.add_stream("libx264", rate=rate, options=_H264)
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        for image in stream:
            frame = av.VideoFrame.from_image(image)
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


_WRITERS: dict[str, Callable[..., bytes | Callable[[Path], None]]] = {
    "gif": _gif,
    "webp": _webp,
    "apng": _apng,
    "mp4": _mp4,
}
assert tuple(_WRITERS) == FORMATS
