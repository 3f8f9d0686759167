"""Metrics against known answers, and the default distance on the miniature and real photographs."""

import builtins
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter

from lorakit.diffusion.metrics import (
    DEFINITIONS,
    LpipsDistance,
    cross_fade,
    make_distance,
    middle_third,
    path_metrics,
    pixel_std,
    relative_sharpness,
    sharpness,
    ssim,
)
from lorakit.diffusion.models import Base
from lorakit.ground.errors import UserError
from lorakit.pictures.images import crop, load_image, resize_to_cover, to_array
from lorakit.weights.base import inspect_base

ALPHAS = np.linspace(0, 1, 17).tolist()


def random_picture(seed, width=32, height=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noised(image, levels, seed=0):
    pixels = np.asarray(image, np.float64) + np.random.default_rng(seed).normal(0, levels, (*image.size, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def tensor(*images):
    return torch.from_numpy(np.stack([to_array(image) for image in images]))


@pytest.fixture(scope="module")
def mountains():
    """The two photographs as the miniature sees them."""
    names = ("dataset/mountain/mountain.jpg", "dataset/mountain_up/mountain_up.jpg")
    return [crop(resize_to_cover(load_image(ROOT / name), 128, 128), 128, 128) for name in names]


@pytest.fixture(scope="module")
def distance():
    return make_distance("vae", Base(inspect_base(str(ROOT / "ckpt/miniature"))))


# Pictures


def test_ssim_equals_scikit_image():
    """scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5, data_range=255,
    use_sample_covariance=False, channel_axis=-1) of the same two pictures, which numpy's generator fixes."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    b = (a.astype(int) + rng.integers(-40, 41, a.shape)).clip(0, 255).astype(np.uint8)
    x, y, inverted = (Image.fromarray(pixels) for pixels in (a, b, 255 - a))
    assert ssim(x, y) == pytest.approx(0.9565729300602274, abs=1e-9)
    assert ssim(x, inverted) == pytest.approx(-0.961509268781587, abs=1e-9)


def test_ssim_of_equal_pictures_is_one_and_is_symmetric(mountains):
    a, b = mountains
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert ssim(a, b) < 0.5 < ssim(a, noised(a, 10)) < 1


def test_ssim_of_two_flat_pictures_is_the_luminance_term():
    a, b = (Image.new("RGB", (16, 16), (grey,) * 3) for grey in (100, 150))
    c1 = 2.55**2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


def test_ssim_wants_pictures_of_one_size_that_hold_the_window():
    with pytest.raises(AssertionError, match="different sizes"):
        ssim(random_picture(0), random_picture(0, 24, 32))
    with pytest.raises(AssertionError, match="smaller than the window"):
        ssim(random_picture(0, 10, 32), random_picture(1, 10, 32))


def test_sharpness_of_a_checkerboard_is_eight_times_its_contrast():
    """Laplacian of +-c in a checkerboard: -+8c everywhere; its standard deviation is 8c."""
    board = (np.indices((20, 20)).sum(axis=0) % 2).astype(np.uint8)
    for low, high in ((0, 255), (100, 140)):
        pixels = np.where(board, high, low).astype(np.uint8)[..., None].repeat(3, axis=-1)
        assert sharpness(Image.fromarray(pixels)) == pytest.approx(8 * (high - low) / 2, rel=1e-9)


def test_sharpness_is_linear_in_contrast_and_blind_to_slopes(mountains):
    image = mountains[0]
    grey = np.full_like(np.asarray(image), 128)
    half = Image.blend(Image.fromarray(grey), image, 0.5)
    assert sharpness(half) == pytest.approx(sharpness(image) / 2, rel=0.02)  # 8 bits round
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3))
    assert sharpness(Image.fromarray(ramp)) == pytest.approx(0, abs=1e-9)


def test_sharpness_falls_under_blur(mountains):
    for image in mountains:
        blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 0.5, 1, 2, 4)]
        assert (np.diff([sharpness(picture) for picture in blurred]) < 0).all()


def test_relative_sharpness_is_one_at_the_pictures_and_below_in_a_cross_fade(mountains):
    """Figures of the floor. Of two unrelated pictures with equal sharpness it is sqrt(1/2) in the middle."""
    found = relative_sharpness(cross_fade(*mountains, ALPHAS), ALPHAS, mountains)
    assert found[0] == found[-1] == 1
    assert middle_third(found) == pytest.approx(0.766, abs=0.002)
    assert min(found) == pytest.approx(0.708, abs=0.002)


def test_relative_sharpness_looks_up_the_segment(mountains):
    a, b = mountains
    positions = [0, 0.5, 1, 1.5, 2]
    ends = [sharpness(a), sharpness(b)]
    found = relative_sharpness([a, a, b, b, a], positions, [a, b, a])
    expected = [1, ends[0] / np.mean(ends), 1, ends[1] / np.mean(ends), 1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_relative_sharpness_of_flat_pictures_is_one():
    flat = Image.new("RGB", (16, 16), "grey")
    assert relative_sharpness([flat, flat], [0, 1], [flat, flat]) == [1, 1]


def test_the_middle_third_leaves_both_ends_out():
    assert middle_third([9] * 5 + [1] * 7 + [9] * 5) == 1
    assert middle_third([1, 3]) == 2
    assert middle_third([9, 2, 9]) == 2


def test_pixel_std_is_zero_for_even_steps_and_known_for_uneven_ones():
    def flats(*greys):
        return [Image.new("RGB", (8, 8), (grey,) * 3) for grey in greys]

    assert pixel_std(flats(0, 10, 20, 30)) == pytest.approx(0, abs=1e-12)
    assert pixel_std(flats(0, 10, 30)) == pytest.approx(5)  # steps of 10 and 20


def test_a_cross_fade_begins_and_ends_with_its_pictures(mountains):
    frames = cross_fade(*mountains, [0, 0.25, 1])
    assert frames[0].tobytes() == mountains[0].tobytes() and frames[2].tobytes() == mountains[1].tobytes()
    mixed = 0.75 * np.asarray(mountains[0], float) + 0.25 * np.asarray(mountains[1], float)
    np.testing.assert_allclose(np.asarray(frames[1], float), mixed, atol=0.501)


# Paths


def test_path_metrics_by_hand():
    """Steps 1, 2, 3, 2. Sum of |differences| over ordered pairs: 2 (1+2+1 + 1+0 + 1) = 12."""
    found = path_metrics([1, 2, 3, 2], 4, [0, 0.1, 0.3, 0.7, 1])
    expected = {
        "path_length": 8,
        "directness": 2,
        "step_variance": 0.5,
        "step_cv": math.sqrt(0.5) / 2,
        "smoothness": 1 - 12 / (2 * 16 * 2),
        "max_over_mean": 1.5,
        "max_over_min": 3,
        "largest_step_at": 0.5,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_even_steps_are_perfect_and_one_jump_is_the_worst():
    even = path_metrics([0.25] * 4, 1, [0, 1, 2, 3, 4])
    assert even == pytest.approx(
        dict(path_length=1, directness=1, step_variance=0, step_cv=0, smoothness=1, max_over_mean=1)
        | dict(max_over_min=1, largest_step_at=0.5)
    )
    jump = path_metrics([0, 0, 1, 0], 1, [0, 0.25, 0.5, 0.75, 1])
    assert jump["smoothness"] == pytest.approx(0.25)  # Gini of one in n: 1 - 1/n
    assert jump["max_over_mean"] == 4 and jump["max_over_min"] is None and jump["largest_step_at"] == 0.625


def test_ratios_over_nothing_are_none():
    still = path_metrics([0, 0], 0, [0, 0.5, 1])
    ratios = {"directness", "step_cv", "smoothness", "max_over_mean", "max_over_min"}
    assert {name for name, value in still.items() if value is None} == ratios
    assert path_metrics([1e100, 5e-324], 1, [0, 0.5, 1])["max_over_min"] is None


def test_every_metric_has_a_definition():
    assert set(path_metrics([1], 1, [0, 1])) <= set(DEFINITIONS)
    assert all(text.endswith(".") and len(text) > 40 for text in DEFINITIONS.values())


@pytest.mark.parametrize("steps", [[], [1, math.nan], [1, -1]])
def test_what_is_no_path_is_refused(steps):
    with pytest.raises(AssertionError):
        path_metrics(steps, 1, list(range(len(steps) + 1)))


# Perceptual distance


def test_distance_is_a_metric_on_photographs_noise_and_mixtures(distance, mountains):
    a, b = mountains
    others = [noised(a, 20), a.filter(ImageFilter.GaussianBlur(2)), a.transpose(Image.Transpose.ROTATE_180)]
    pictures = [a, b, *others, random_picture(0, 128, 128), *cross_fade(a, b, [0.3, 0.6])]
    d = distance.matrix(distance.features(tensor(*pictures))).numpy()
    np.testing.assert_array_equal(d, d.T)
    assert (d.diagonal() == 0).all() and (d[~np.eye(len(d), dtype=bool)] > 0).all()
    assert (d[:, None, :] <= d[:, :, None] + d[None, :, :] + 1e-9).all()  # d(i,k) <= d(i,j) + d(j,k)
    squared = d**2  # without the root it is none
    assert (squared[:, None, :] > squared[:, :, None] + squared[None, :, :]).any()


def test_matrix_and_between_agree(distance, mountains):
    f = distance.features(tensor(*cross_fade(*mountains, ALPHAS[::4])))
    rows = torch.stack([distance.between(f, [level[i : i + 1] for level in f]) for i in range(5)])
    torch.testing.assert_close(distance.matrix(f), rows, rtol=0, atol=1e-6)


def test_no_path_is_shorter_than_the_direct_distance(distance, mountains):
    f = distance.features(tensor(*cross_fade(*mountains, ALPHAS)))
    d = distance.matrix(f)
    steps = distance.between([level[:-1] for level in f], [level[1:] for level in f]).tolist()
    assert path_metrics(steps, float(d[0, -1]), ALPHAS)["directness"] >= 1
    coarse = float(d[0, 8] + d[8, 16])
    assert d[0, 16] <= coarse <= sum(steps)


def test_a_slightly_changed_picture_is_nearer_than_another_one(distance, mountains):
    for a, b in (mountains, mountains[::-1]):
        f = distance.features(tensor(a, a, noised(a, 3), noised(a, 12), noised(a, 50), b))
        from_a = distance.between(f, [level[:1] for level in f])
        assert from_a[0] == from_a[1] == 0
        assert (from_a[1:].diff() > 0).all()
        assert from_a[2] < 0.1 * from_a[5] and from_a[3] < 0.2 * from_a[5]


def test_features_do_not_depend_on_the_batch_and_stay_on_the_cpu(distance, mountains):
    pictures = tensor(*cross_fade(*mountains, [0, 0.4, 1]))
    together = distance.features(pictures)
    assert [level.shape[0] for level in together] == [3] * 4
    assert {(level.dtype, level.device.type) for level in together} == {(torch.float16, "cpu")}
    for i in range(3):
        alone = distance.features(pictures[i : i + 1])
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[i : i + 1], part)


def test_half_precision_is_enough(distance, mountains):
    a, b = tensor(*cross_fade(*mountains, [0.5, 0.5625])).split(1)
    with torch.no_grad():
        exact = distance.between(distance.levels(a), distance.levels(b))
    torch.testing.assert_close(
        distance.between(distance.features(a), distance.features(b)), exact, rtol=1e-4, atol=0
    )


def test_distance_lies_within_its_bound_on_noise(distance):
    """Unit vectors are at most 2 apart, and the weights of the levels sum to 1."""
    f = distance.features(2 * torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1)
    d = distance.matrix(f)
    assert 0 < d[0, 1] and d.max() <= 2


def test_random_vae_of_another_shape_works_too(tiny_base):
    distance = make_distance("vae", Base(inspect_base(str(tiny_base))))
    f = distance.features(tensor(random_picture(0, 16, 16), random_picture(1, 16, 16)))
    assert len(f) == 2 and distance.matrix(f)[0, 1] > 0


class FakeLpips(torch.nn.Module):
    """The parts of lpips.LPIPS that are used, two levels deep, and its published value."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex" and not verbose
        self.scaling_layer = torch.nn.BatchNorm2d(3)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3, 2)
        self.lins = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for level, channels in zip(self.lins, (8, 4), strict=True):
            weight = torch.nn.Conv2d(channels, 1, 1, bias=False)
            weight.weight.data.abs_()
            level.model = torch.nn.Sequential(torch.nn.Dropout(), weight)

    def net(self, x):
        first = self.first(x).relu()
        return [first, self.second(first).relu()]

    def forward(self, a, b):
        total = 0
        for f, g, level in zip(self.net(a), self.net(b), self.lins, strict=True):
            f, g = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (f, g))
            total = total + level.model((f - g) ** 2).mean((1, 2, 3))
        return total


def fake_lpips(monkeypatch, make):
    module = ModuleType("lpips")
    monkeypatch.setattr(module, "LPIPS", make, raising=False)
    monkeypatch.setitem(sys.modules, "lpips", module)


def test_lpips_distance_is_the_root_of_lpips(monkeypatch):
    fake_lpips(monkeypatch, FakeLpips)
    torch.manual_seed(0)
    distance = LpipsDistance()
    a, b = tensor(random_picture(0), random_picture(1), random_picture(2), random_picture(3)).split(2)
    scaled = (distance.network.scaling_layer(x) for x in (a, b))
    published = distance.network(*scaled).double()
    ours = distance.between(distance.features(a), distance.features(b))
    torch.testing.assert_close(ours**2, published, rtol=1e-3, atol=0)


def test_lpips_distance_says_what_is_missing(monkeypatch, tiny_base):
    base = Base(inspect_base(str(tiny_base)))

    def offline(**_):
        raise OSError("urlopen error: no network")

    fake_lpips(monkeypatch, offline)
    with pytest.raises(UserError, match=r"no network.*alexnet-owt-7be5be79\.pth.*distance to vae"):
        make_distance("lpips", base)

    original = builtins.__import__

    def without_lpips(name, *args, **kwargs):
        if name == "lpips":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_lpips)
    with pytest.raises(UserError, match="pip install lpips.*distance to vae"):
        make_distance("lpips", base)
