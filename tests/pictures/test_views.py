"""Buckets, shapes and the names of cache entries."""

import numpy as np
import pytest
from PIL import Image

from lorakit.pictures.folder import Row
from lorakit.pictures.views import View, assign_shapes, bucket_shapes, views_of


def make_row(sha256: str = "a" * 64, name: str = "x.png") -> Row:
    return Row(file=name, name=name, caption="a", width=200, height=100, sha256=sha256, line="x.txt")


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (768, 64), (128, 32), (64, 64), (200, 8)])
def test_buckets_divide_stay_within_the_area_and_come_in_pairs(resolution, multiple):
    shapes = bucket_shapes(resolution, multiple)
    assert shapes
    for width, height in shapes:
        assert width % multiple == 0 and height % multiple == 0
        assert width * height <= resolution * resolution
        assert (height, width) in shapes


def test_each_picture_goes_to_the_bucket_of_the_nearest_aspect():
    sizes = [(1000, 1000), (1500, 1000), (1000, 1500), (3000, 1000)]
    shapes = assign_shapes(sizes, 512, 64, buckets=True)
    assert shapes[0] == (512, 512)
    assert shapes[1][0] > shapes[1][1] and shapes[2] == shapes[1][::-1]
    assert shapes[3] == max(bucket_shapes(512, 64), key=lambda shape: shape[0] / shape[1])


def test_without_buckets_everything_is_square():
    assert assign_shapes([(100, 300), (5, 5)], 128, 32, buckets=False) == [(128, 128)] * 2


def test_an_entry_is_named_by_content_and_transform_never_by_file_name():
    base = View(make_row(), (128, 128)).entry("vae")
    assert View(make_row(name="other.png"), (128, 128)).entry("vae") == base
    others = [
        View(make_row("b" * 64), (128, 128)).entry("vae"),
        View(make_row(), (128, 96)).entry("vae"),
        View(make_row(), (128, 128), flip=True).entry("vae"),
        View(make_row(), (128, 128), offset=(0.0, 0.5)).entry("vae"),
        View(make_row(), (128, 128)).entry("another vae"),
        View(make_row(), (128, 128)).entry("vae", "float16"),
    ]
    assert len({base, *others}) == 7


def test_a_picture_that_fits_its_shape_has_one_crop_and_its_mirror():
    assert len(views_of(make_row(), (64, 32), crops=8)) == 1
    assert [view.flip for view in views_of(make_row(), (64, 32), crops=8, flip=True)] == [False, True]


def test_crops_begin_with_the_middle_and_do_not_change():
    views = views_of(make_row(), (64, 64), crops=8)
    assert views[0].offset == (0.5, 0.5)
    assert len({view.offset for view in views}) == 8
    assert views == views_of(make_row(), (64, 64), crops=8)
    assert views[1:] != views_of(make_row("b" * 64), (64, 64), crops=8)[1:]


def test_pixels_are_the_part_that_the_offset_names():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    row = make_row()
    left, middle, right = (View(row, (100, 100), (x, 0.5)).pixels(ramp)[0].mean() for x in (0.0, 0.5, 1.0))
    assert left < middle < right
    plain, mirrored = View(row, (100, 100)).pixels(ramp), View(row, (100, 100), flip=True).pixels(ramp)
    assert plain.shape == (3, 100, 100)
    np.testing.assert_array_equal(plain, mirrored[..., ::-1])
