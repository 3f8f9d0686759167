"""Every picture that can be met is loaded right or refused by name; arrays and files keep each level."""

import io
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from lorakit.ground.errors import OutputError
from lorakit.pictures import images
from lorakit.pictures.images import (
    ImageError,
    crop,
    from_array,
    image_size,
    load_image,
    psnr,
    resize_to_cover,
    save_png,
    to_array,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def noise(width=32, height=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height, bits=1):
    """A PNG of a few bytes that claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def swapped_profile():
    """A valid RGB profile that shows red as blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "sRGB".encode("utf-16-be")
    assert name in profile
    profile = profile.replace(name, "swap".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"tmp_", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp_", b"bXYZ", 1)


# ---- I1 to I11 of what goes wrong with pictures ----


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.95])
def test_i1_a_truncated_file_is_refused_by_name(kind, share, tmp_path):
    content = encoded(noise(64, 64), kind)
    path = tmp_path / "cut.png"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match=r"cut\.png: .*(truncated|broken)"):
        load_image(path)


def test_i2_a_flipped_byte_in_a_png_is_refused():
    content = bytearray(encoded(noise()))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="broken PNG"):
        load_image(bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"just some words\n", "looks like text"),
        ("Zürich, caf\xe9".encode("latin-1"), "looks like text"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes(range(256)), "not a picture of a known type; supported are PNG"),
        (b"\x89PNG", "begins like a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "looks like text"),
    ],
)
def test_i3_a_file_that_is_no_picture_is_named_for_what_it_looks_like(content, message, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ImageError, match=rf"x\.jpg: .*{message}"):
            load_image(source)
    with pytest.raises(ImageError, match=f"^row 7: .*{message}"):
        image_size(content, name="row 7")


@pytest.mark.parametrize("size", [(13_400, 13_400), (12_000, 12_000), (8001, 8000)])
def test_i4_a_bomb_is_refused_from_the_header(size, recwarn):
    for function in (load_image, image_size):
        with pytest.raises(ImageError, match="pixels"):
            function(png_header(*size), name="bomb.png")
    assert not recwarn.list


def test_i4_the_limits_of_pillow_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS
    assert image_size(png_header(12_000, 12_000), max_pixels=200_000_000) == (12_000, 12_000)
    with pytest.raises(ImageError):
        load_image(png_header(20_000, 20_000), max_pixels=10**9)
    assert Image.MAX_IMAGE_PIXELS == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_i4_the_limit_on_pixels_counts():
    content = encoded(noise(10, 10))
    assert load_image(content, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10x10"):
        load_image(content, max_pixels=99)


def test_i5_an_icc_profile_is_converted_to_srgb():
    red = Image.new("RGB", (8, 8), RED)
    assert load_image(encoded(red)).getpixel((0, 0)) == RED
    pixel = load_image(encoded(red, icc_profile=swapped_profile())).getpixel((0, 0))
    assert pixel[2] > 250 and pixel[0] < 5
    assert "icc_profile" not in load_image(encoded(red, icc_profile=swapped_profile())).info


def test_i5_an_srgb_profile_changes_no_pixel():
    image = noise()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert psnr(load_image(encoded(image, icc_profile=profile)), image) == np.inf


@pytest.mark.parametrize("profile", [b"junk", swapped_profile()[:200], b"\0" * 16 + b"RGB " + b"\0" * 300])
def test_i5_a_broken_profile_leaves_the_pixels(profile):
    image = noise()
    assert psnr(load_image(encoded(image, icc_profile=profile)), image) == np.inf


def test_i5_cmyk_is_converted():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for options in ({}, {"icc_profile": swapped_profile()}):  # a profile for RGB says nothing about CMYK
        pixel = load_image(encoded(red, "JPEG", quality=95, **options)).getpixel((8, 8))
        assert pixel[0] > 245 and max(pixel[1:]) < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_i6_16_bit_grey_is_scaled_not_clipped(kind):
    content = encoded(Image.fromarray(np.full((8, 8), 32768, np.uint16)), kind)
    with Image.open(io.BytesIO(content)) as plain:
        assert plain.mode.startswith("I;16")
    image = load_image(content)
    assert image.mode == "RGB" and np.asarray(image).mean() == 127
    ends = Image.fromarray(np.array([[0, 256, 257, 65535]], np.uint16))
    assert np.asarray(load_image(encoded(ends, kind)))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_i6_32_bit_grey_is_taken_only_where_it_fits_16_bits():
    fits = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert np.asarray(load_image(encoded(fits, "TIFF")))[0, :, 0].tolist() == [0, 255]
    for levels in ([0, 65536], [-1, 400], [0, 200]):
        with pytest.raises(ImageError, match="32-bit grey"):
            load_image(encoded(Image.fromarray(np.array([levels], np.int32)), "TIFF"))
    with pytest.raises(ImageError, match="floating-point"):
        load_image(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def hidden_red(mode):
    """Red that is wholly transparent in its upper half."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 4))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 255, 0, *RED])
        image.paste(0, (0, 0, 8, 4))
        image.info["transparency"] = 0
    return image.convert(mode) if mode == "LA" else image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_i7_transparency_is_laid_on_the_background(mode):
    content = encoded(hidden_red(mode))
    image = load_image(content, background=(10, 20, 30))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (10, 20, 30)
    assert image.getpixel((0, 7)) == ((76, 76, 76) if mode == "LA" else RED)
    assert load_image(content).getpixel((0, 0)) == WHITE
    assert image.info == {"transparent_share": 0.5}


def test_i7_the_transparent_colour_of_rgb_is_seen():
    image = Image.new("RGB", (4, 4), RED)
    image.putpixel((0, 0), (0, 255, 0))
    loaded = load_image(encoded(image, transparency=(0, 255, 0)))
    assert loaded.getpixel((0, 0)) == WHITE and loaded.getpixel((1, 0)) == RED


def test_i7_the_transparent_level_of_16_bit_grey_is_seen():
    image = Image.fromarray(np.array([[0, 65535, 257]], np.uint16))
    loaded = load_image(encoded(image, transparency=0))
    assert np.asarray(loaded)[0, :, 0].tolist() == [255, 255, 1]
    assert loaded.info["transparent_share"] == pytest.approx(1 / 3)


def test_i7_an_opaque_picture_carries_no_share():
    assert load_image(encoded(noise())).info == {}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_i8_several_frames_are_refused_unless_the_first_is_wanted(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    for function in (load_image, image_size):
        with pytest.raises(ImageError, match="several frames"):
            function(content)
    assert load_image(content, animated="first").getpixel((0, 0)) == RED
    assert load_image(encoded(frames[0], kind, **options)).getpixel((0, 0)) == RED


def test_i8_a_photo_with_a_preview_is_no_animation():
    frames = [noise(16, 16, seed) for seed in range(2)]
    content = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert load_image(content).size == (16, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_i9_exif_orientation_is_applied_once(kind, orientation):
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste(RED, (0, 0, 24, 16))
    upright.paste(BLUE, (24, 0, 48, 16))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as the sensor saw it
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    content = encoded(stored, kind, exif=exif, **options)
    image = load_image(content)
    assert image.size == image_size(content) == (48, 32)
    assert psnr(image, upright) > 30
    assert psnr(load_image(encoded(image)), image) == np.inf  # saved again, it is not turned again


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_i9_broken_exif_leaves_the_picture_as_it_is(exif):
    content = encoded(noise(16, 8), "JPEG", exif=exif)
    assert load_image(content).size == image_size(content) == (16, 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 600)])
def test_i10_a_tiny_picture_loads(size):
    assert load_image(encoded(Image.new("RGB", size))).size == size


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    ],
)
def test_i11_an_unsupported_type_is_named_with_what_is_supported(head, message):
    with pytest.raises(ImageError, match=f"photo: {message}.*supported are PNG, JPEG"):
        load_image(head, name="photo")


# ---- the rest of loading ----


def test_a_missing_file_a_folder_and_a_path_too_long_are_refused(tmp_path):
    for path in (tmp_path / "no.png", tmp_path, tmp_path / ("x" * 300)):
        for function in (load_image, image_size):
            with pytest.raises(ImageError, match=str(path)):
                function(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = load_image(encoded(noise().convert(mode), kind))
    assert image.mode == "RGB" and image.size == (32, 24)


def test_lab_becomes_rgb():
    grey = Image.merge("LAB", [Image.new("L", (8, 8), 128)] * 3)
    assert load_image(encoded(grey, "TIFF")).getpixel((0, 0)) == (119, 119, 119)  # L* = 50.2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("seed", range(4))
def test_mutated_bytes_give_a_picture_or_an_image_error(kind, seed):
    rng = random.Random(f"{kind}{seed}")
    content = encoded(noise(16, 16).quantize(16) if kind == "GIF" else noise(16, 16), kind)
    for _ in range(40):
        mutated = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            mutated[rng.randrange(min(len(mutated), 200))] = rng.randrange(256)
        for function in (load_image, image_size):
            try:
                function(bytes(mutated), max_pixels=10**6, name="x")
            except ImageError as error:
                assert str(error).startswith("x: ")


def test_threads_load_the_same_pixels():
    contents = [encoded(noise(seed=seed)) for seed in range(16)]
    results = [None] * len(contents)

    def work(i):
        results[i] = load_image(contents[i]).tobytes()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [noise(seed=seed).tobytes() for seed in range(16)]


# ---- sizes and arrays ----


@pytest.mark.parametrize("seed", range(30))
def test_resize_to_cover_covers_with_one_exact_side_and_keeps_the_aspect(seed):
    rng = random.Random(seed)
    w, h, width, height = (rng.randint(1, 90) for _ in range(4))
    result = resize_to_cover(Image.new("RGB", (w, h)), width, height)
    assert result.width >= width and result.height >= height
    assert result.width == width or result.height == height
    scale = max(width / w, height / h)
    assert abs(result.width - w * scale) <= 1 and abs(result.height - h * scale) <= 1


def test_resize_to_cover_keeps_a_picture_that_fits():
    assert psnr(resize_to_cover(noise(), 32, 24), noise()) == np.inf


def test_crop_is_centred_unless_told_otherwise():
    image = noise(31, 24)
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(crop(image, 10, 8)), pixels[8:16, 10:20])
    assert np.array_equal(np.asarray(crop(image, 10, 8, left=0)), pixels[8:16, 0:10])
    assert np.array_equal(np.asarray(crop(image, 10, 8, left=21, top=16)), pixels[16:24, 21:31])
    for bad in [(32, 8), (10, 8, 22), (10, 8, 0, -1)]:
        with pytest.raises(AssertionError):
            crop(image, *bad)


def test_every_level_survives_the_round_trip_through_an_array():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    array = to_array(image)
    assert array.dtype == np.float32 and array.shape == (3, 16, 16) and array.flags.c_contiguous
    assert array.min() == -1 and array.max() == 1
    assert from_array(array).tobytes() == image.tobytes()


def test_the_axes_of_an_array_are_channel_row_column():
    image = Image.new("RGB", (5, 3))
    image.putpixel((4, 1), (255, 0, 0))
    assert np.argwhere(to_array(image) == 1).tolist() == [[0, 1, 4]]


def test_from_array_clips_and_rounds_half_to_even():
    values = np.array([-7, -1, 7, 0, 0.6 / 127.5 - 1], np.float32)  # 0 is level 127.5
    assert from_array(np.broadcast_to(values, (3, 1, 5))).tobytes()[::3] == bytes([0, 0, 255, 128, 1])
    with pytest.raises(AssertionError, match="NaN"):
        from_array(np.full((3, 2, 2), np.nan))


def test_psnr_has_known_values():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert psnr(grey, grey) == np.inf
    assert psnr(Image.new("RGB", (4, 4), 0), Image.new("RGB", (4, 4), WHITE)) == 0
    assert psnr(grey, Image.new("RGB", (8, 8), (101, 99, 101))) == pytest.approx(48.1308, abs=1e-4)
    with pytest.raises(AssertionError, match="sizes"):
        psnr(grey, Image.new("RGB", (8, 9)))


# ---- files ----


def test_save_png_keeps_pixels_and_text(tmp_path):
    path = tmp_path / "a.png"
    save_png(noise(), path, text={"prompt": "Gebirge bei Nacht, 山", "seed": "7"})
    assert psnr(load_image(path), noise()) == np.inf
    with Image.open(path) as image:
        assert image.text == {"prompt": "Gebirge bei Nacht, 山", "seed": "7"}
    assert os.listdir(tmp_path) == ["a.png"]


def test_save_png_gives_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_png(noise(), tmp_path / "a.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(noise(seed=1), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.png.*No space left"):
        save_png(noise(seed=2), path)
    assert psnr(load_image(path), noise(seed=1)) == np.inf
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        save_png(noise(), tmp_path / "no" / "a.png")


def test_importing_images_imports_no_torch():
    code = "import sys, lorakit.pictures.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def jpeg(**options) -> bytes:
    pixels, content = np.random.default_rng(0).integers(0, 256, (23, 37, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(content, "JPEG", **options)
    return content.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("options", "short"),
    [
        ({}, True),
        ({"progressive": True}, True),
        ({"mode": "L", "comment": b"hills"}, True),
        ({"icc_profile": b"x" * 3000, "restart_marker_rows": 1}, True),
        ({"mode": "CMYK"}, False),
        ({"exif": turned()}, False),
        ({"xmp": b"<x:xmpmeta tiff:Orientation='6'/>"}, False),
    ],
)
def test_the_short_way_to_the_size_of_a_jpeg_tells_what_pillow_does(options, short, monkeypatch):
    """Of the whole file and of every cut of it."""
    content = jpeg(**options)
    assert (images._jpeg_size(content) is not None) == short

    def told(data):
        try:
            return image_size(data)
        except ImageError as error:
            return str(error)

    parts = [content[:end] for end in (*range(0, min(len(content), 900), 3), len(content))]
    short_way = [told(part) for part in parts]
    monkeypatch.setattr(images, "_jpeg_size", lambda _: None)
    assert short_way == [told(part) for part in parts] and short_way[-1] in ((37, 23), (23, 37))


def test_a_jpeg_over_the_limit_is_refused_whichever_way(monkeypatch):
    with pytest.raises(ImageError, match="37x23 is over 100 pixels"):
        image_size(jpeg(), max_pixels=100)
