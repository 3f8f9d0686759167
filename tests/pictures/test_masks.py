"""Masks beside pictures, and alpha as a mask: which picture they belong to, and what weights they give."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.pictures.folder import DataError, read_folder
from lorakit.pictures.masks import mask_entry, mask_weights
from lorakit.pictures.views import View, views_of


def half(size: tuple[int, int]) -> Image.Image:
    """White on the left, black on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (64, 32), (9, 9, ord(name))).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a ridge")
    half((64, 32)).save(tmp_path / "a-masklabel.png")
    return tmp_path


def test_a_mask_is_no_picture_and_is_said_where_it_is_not_used(root):
    table = read_folder(root)
    assert [row.name for row in table.rows] == ["a.png", "b.png"] and table.rows[0].mask is None
    assert 'masks are not used (a-masklabel.png): set masked_loss to "beside"' in table.warnings
    masked = read_folder(root, masks=True)
    assert [row.mask and row.mask.name for row in masked.rows] == ["a-masklabel.png", None]
    assert not masked.warnings and masked.fingerprint != table.fingerprint


def test_a_name_that_ends_so_without_a_picture_is_a_picture(root):
    (root / "a.png").rename(root / "c.png")
    (root / "a.txt").rename(root / "c.txt")
    with pytest.raises(DataError, match=r"a-masklabel.png' has no caption"):
        read_folder(root, masks=True)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Image.new("L", (64, 32), 0), "its mask is black"),
        (Image.new("L", (32, 32), 255), "is 64x32, its mask 32x32"),
        (b"junk", "its mask cannot be read"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(root, mask, words):
    path = root / "a-masklabel.png"
    path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
    with pytest.raises(DataError, match=words):
        read_folder(root, masks=True)
    assert len(read_folder(root).rows) == 2


def test_a_mask_outside_the_folder_is_refused(root, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "mask.png"
    (root / "a-masklabel.png").rename(away)
    (root / "a-masklabel.png").symlink_to(away)
    with pytest.raises(DataError, match="symbolic link"):
        read_folder(root, masks=True)
    assert read_folder(root, masks=True, allow_symlinks=True).rows[0].mask


def test_weights_follow_the_crop_and_the_mirror_of_a_view(root):
    row, plain = read_folder(root, masks=True).rows
    whole, mirrored = views_of(row, (64, 32), flip=True)
    weights = mask_weights(whole, "beside", 8)
    assert weights.shape == (1, 4, 8) and weights.dtype == np.float32
    np.testing.assert_allclose(weights[0], [[1] * 4 + [0] * 4] * 4, atol=1e-6)
    np.testing.assert_array_equal(mask_weights(mirrored, "beside", 8), weights[..., ::-1])
    left, right = (View(row, (32, 32), (x, 0.5)) for x in (0.0, 1.0))
    assert mask_weights(left, "beside", 8).min() == 1 and mask_weights(right, "beside", 8).max() == 0
    assert mask_weights(views_of(plain, (64, 32))[0], "beside", 8).min() == 1


def test_a_cell_on_the_border_has_the_share_that_is_white(root):
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 20, 32))
    mask.save(root / "a-masklabel.png")
    weights = mask_weights(views_of(read_folder(root, masks=True).rows[0], (64, 32))[0], "beside", 8)
    np.testing.assert_allclose(weights[0, 0], [1, 1, 0.5, 0, 0, 0, 0, 0], atol=1e-6)


def test_alpha_is_a_mask_whatever_the_colours(root):
    colours = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    picture.putalpha(half((64, 32)))
    picture.save(root / "b.png")
    opaque, row = read_folder(root).rows
    assert row.transparent == 0.5 and opaque.transparent == 0
    weights = mask_weights(views_of(row, (64, 32))[0], "alpha", 8)
    np.testing.assert_allclose(weights[0], [[1] * 4 + [0] * 4] * 4, atol=1e-6)
    assert mask_weights(views_of(opaque, (64, 32))[0], "alpha", 8).min() == 1


def test_entries_are_named_by_the_mask_and_the_view(root):
    row = read_folder(root, masks=True).rows[0]
    whole, mirrored = views_of(row, (64, 32), flip=True)
    names = {mask_entry(view, kind, 8) for view in (whole, mirrored) for kind in ("beside", "alpha")}
    assert len(names) == 4
    half((64, 32)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "a-masklabel.png")
    other = views_of(read_folder(root, masks=True).rows[0], (64, 32))[0]
    assert mask_entry(other, "beside", 8) not in names
