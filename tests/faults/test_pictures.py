"""Faults of pictures, I1 to I11: the scripts that read pictures say the same of each, from its header.

What `load_image` makes of every kind of sound picture is in tests/test_images.py; here are whole commands.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import assert_refused, sha, snapshot
from PIL import Image, features

READERS = ("train_lora", "morph", "invert", "style_transfer")


@pytest.fixture
def read(command, train, film, inversion, restyling, data):
    """Runs one of READERS on a picture; the picture of a training takes the place of data/1.png."""

    def run(script: str, picture: Path, *flags: str, **changes):
        if script == "train_lora":
            for path in data.iterdir():
                if path.name not in ("0.png", "2.png", "3.png", "metadata.jsonl"):
                    path.unlink()
            if picture.exists():
                (data / picture.name).write_bytes(picture.read_bytes())
            texts = (data / "metadata.jsonl").read_text().splitlines()
            texts[1] = json.dumps({"file_name": picture.name, "text": "x"})
            (data / "metadata.jsonl").write_text("\n".join(texts))
            return command(script, [*train(**changes), *flags])
        make = {"morph": film, "invert": inversion, "style_transfer": restyling}[script]
        return command(script, [*make(picture, **changes), *flags])

    return run


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """65 bytes that promise a picture of any size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"12345678") + chunk(b"IEND", b"")


def noise(size=(48, 40), mode="RGB") -> Image.Image:
    shape = (size[1], size[0], *([3] if mode == "RGB" else []))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def animation(kind: str) -> Callable[[], bytes]:
    frames = [noise(), Image.new("RGB", (48, 40), "red")]
    return lambda: encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def floats() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 1, 48 * 40, dtype=np.float32).reshape(40, 48)), "TIFF")


def bomb() -> bytes:
    """A sound PNG of 169 million pixels in some 20 kB, which Pillow would only warn of."""
    return encoded(Image.new("1", (13_000, 13_000)), "PNG")


HEADER = {
    "I3 text": ("x.jpg", lambda: b"a few words", ["looks like text, not a picture", "supported are"]),
    "I3 empty": ("x.png", lambda: b"", ["0 bytes", "replace it"]),
    "I3 pointer": ("x.webp", lambda: b"version https://git-lfs.github.com/spec/v1\noid", ["`git lfs pull`"]),
    "I3 web page": ("x.png", lambda: b"<!doctype html><html><body>404", ["web page", "download the picture"]),
    "I4 header alone": ("x.png", lambda: png_header(13_400, 13_400), ["pixels", "smaller"]),
    "I4 header within Pillow's limit": (
        "x.png",
        lambda: png_header(9_000, 9_000),
        ["9000x9000 is over 64,000,000 pixels", "shrink it"],
    ),
    "I4 169 million pixels": ("x.png", bomb, ["13000x13000 is over 64,000,000 pixels"]),
    "I6 floating point": ("x.tif", floats, ["floating-point pixels", "8 or 16 bits"]),
    "I8 GIF": ("x.gif", animation("GIF"), ["several frames", "file of its own"]),
    "I8 APNG": ("x.png", animation("PNG"), ["several frames", "file of its own"]),
    "I8 WebP": ("x.webp", animation("WEBP"), ["several frames", "file of its own"]),
    "I8 TIFF": ("x.tif", animation("TIFF"), ["several frames or pages", "file of its own"]),
    "I11 HEIC": ("x.jpg", lambda: b"\0\0\0\x18ftypheic\0\0\0\0", ["HEIC", "convert it", "supported are"]),
    "I11 JPEG XL": ("x.png", lambda: b"\xff\x0a\xfa\x7f", ["JPEG XL", "convert it", "supported are"]),
    "I11 SVG": ("x.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', ["SVG", "export it as PNG"]),
    "I11 not a picture": ("x.png", lambda: bytes(range(256)), ["not a picture of a known type"]),
}


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize("case", HEADER)
def test_refused_from_the_header(read, tmp_path, case, script):
    name, content, words = HEADER[case]
    picture = tmp_path / name
    picture.write_bytes(content())
    digest = sha(picture)
    result = read(script, picture)
    assert_refused(result, 2, name, *words)
    assert not result.torch and result.blinks < 20 and result.grown < 60e6
    assert sha(picture) == digest and not snapshot(tmp_path / "out")


@pytest.mark.parametrize("script", READERS)
def test_i3_a_picture_that_is_not_there(read, tmp_path, script):
    assert_refused(read(script, tmp_path / "gone.png"), 2, "gone.png")


def cut(kind: str, share: float) -> bytes:
    content = encoded(noise(), kind)
    return content[: int(share * len(content))]


@pytest.mark.parametrize("script", ["train_lora", "invert"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_i1_a_picture_that_is_cut_behind_its_header(read, tmp_path, kind, script):
    """Found before torch is imported; that of morph.py, which looks at headers, is in test_morph.py."""
    whole, half = tmp_path / f"whole.{kind.lower()}", tmp_path / f"half.{kind.lower()}"
    whole.write_bytes(encoded(noise(), kind))
    half.write_bytes(cut(kind, 0.6))
    result = read(script, half)
    assert_refused(
        result, 2, half.name, f"truncated or broken {kind}" if kind != "WEBP" else "broken", "replace"
    )
    assert not result.torch and not snapshot(tmp_path / "out")
    assert read(script, whole, "--check").code == 0


def test_i1_broken_pictures_may_be_left_out_by_name(read, tmp_path):
    half = tmp_path / "half.jpg"
    half.write_bytes(cut("JPEG", 0.5))
    result = read("train_lora", half, "--check", broken_images="skip")
    assert result.code == 0 and "1 broken picture(s) are left out: data/half.jpg" in result.out.replace(
        f"{tmp_path}/", ""
    )


@pytest.mark.parametrize("script", ["train_lora", "invert"])
def test_i2_a_byte_of_a_png_that_flipped(read, tmp_path, script):
    content = bytearray(encoded(noise(), "PNG"))
    content[len(content) // 2] ^= 16
    picture = tmp_path / "flipped.png"
    picture.write_bytes(content)
    assert_refused(read(script, picture), 2, "flipped.png", "truncated or broken PNG", "replace")


def test_i2_a_byte_of_a_jpeg_that_flipped_decodes_and_is_seen_when_the_run_resumes(
    command, train, data, a_run
):
    photo = bytearray(encoded(noise((240, 200)), "JPEG"))
    (data / "1.png").write_bytes(photo)
    run = a_run(train(max_train_steps=9))
    resume = train(max_train_steps=3, resume_from_checkpoint="latest")
    assert_refused(command("train_lora", resume), 2, "is at step 6, past the 3 steps")
    photo[len(photo) // 2] ^= 1
    (data / "1.png").write_bytes(photo)
    assert command("train_lora", [*train(), "--check"]).code == 0  # no decoder notices
    before = snapshot(run)
    assert_refused(command("train_lora", resume), 2, str(run), "pictures or captions changed", "ckpt_name")
    assert snapshot(run) == before


def test_i4_the_memory_of_a_refusal_is_that_of_a_header(read, tmp_path):
    """And the same measure sees a picture that is decoded."""
    refused, decoded = tmp_path / "refused.png", tmp_path / "decoded.png"
    refused.write_bytes(bomb())
    decoded.write_bytes(encoded(Image.new("L", (7900, 7900)), "PNG"))
    assert read("train_lora", refused).grown < 40e6
    result = read("train_lora", decoded, "--check")
    assert result.code == 0 and result.grown > 60e6


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise((96, 48)), "JPEG", exif=exif)


@pytest.mark.parametrize("script", READERS)
def test_i9_every_script_sees_a_turned_photo_upright(read, tmp_path, script):
    upright = encoded(noise((96, 48)), "JPEG")
    for name, content, size in (("upright.jpg", upright, "96x48"), ("turned.jpg", rotated(), "48x96")):
        (tmp_path / name).write_bytes(content)
        result = read(script, tmp_path / name, "--check")
        said = next(line for line in result.out.splitlines() if name in line)
        if script == "invert":  # it tells the size at which the base sees the picture
            width, height = said.split(" at ")[1].split(",")[0].split("x")
            assert (int(width) > int(height)) == (name == "upright.jpg"), said
        else:
            assert size in said, said


SOUND = {
    "I5 CMYK": ("x.jpg", lambda: encoded(noise().convert("CMYK"), "JPEG")),
    "I6 16-bit grey": (
        "x.png",
        lambda: encoded(Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 30), "PNG"),
    ),
    "I7 transparent": ("x.png", lambda: encoded(Image.new("RGBA", (48, 40), (9, 9, 9, 0)), "PNG")),
    "I7 palette": ("x.png", lambda: encoded(noise().quantize(8), "PNG", transparency=0)),
    "I7 grey with alpha": ("x.png", lambda: encoded(Image.new("LA", (48, 40), (9, 90)), "PNG")),
    "I11 AVIF": ("x.avif", lambda: encoded(noise(), "AVIF")),
    "I11 BMP": ("x.bmp", lambda: encoded(noise(), "BMP")),
}


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize("case", SOUND)
def test_taken(read, tmp_path, case, script):
    name, content = SOUND[case]
    if "AVIF" in case and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    (tmp_path / name).write_bytes(content())
    result = read(script, tmp_path / name, "--check")
    assert result.code == 0 and not result.torch, result.err
    if case == "I7 transparent" and script == "train_lora":
        assert "1 picture(s), mostly transparent, are laid on the colour (255, 255, 255): x.png" in result.out


@pytest.mark.parametrize(
    ("size", "words", "ways_out"),
    [
        ((1, 1), ["1x1 has a side below 16 pixels", "use larger pictures"], {}),
        ((1, 6000), ["1x6000 has a side below 16"], {}),
        ((20, 100), ["5.00 to 1, max_aspect is 4", "raise max_aspect"], {"max_aspect": 5}),
        ((64_000, 16), ["max_aspect"], {}),
    ],
)
def test_i10_sizes_that_training_refuses(read, tmp_path, size, words, ways_out):
    (tmp_path / "x.png").write_bytes(encoded(Image.new("L", size), "PNG"))
    result = read("train_lora", tmp_path / "x.png")
    assert_refused(result, 2, "x.png", *words)
    assert not result.torch
    if ways_out:
        assert read("train_lora", tmp_path / "x.png", "--check", **ways_out).code == 0


def test_i10_a_picture_smaller_than_it_is_trained_or_shown_at_is_noted(read, tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(Image.new("L", (20, 20)), "PNG"))
    result = read("train_lora", tmp_path / "x.png", "--check")
    assert result.code == 0 and "smaller than they are trained at" in result.out and "x.png" in result.out
    result = read("morph", tmp_path / "x.png", "--check")
    assert result.code == 0 and "less than half as large as the frames" in result.out
