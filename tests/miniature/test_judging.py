"""What judges samples sees that they are soft."""

import pytest
from torch.nn import functional as F

from lorakit.diffusion import metrics
from lorakit.diffusion.models import Base
from lorakit.pictures.images import from_array
from lorakit.weights.base import inspect_base
from miniature.gates import judged_renders
from miniature.judging import sharpness, texture, texture_distance

COUNT = 6


@pytest.fixture(scope="module")
def renders():
    return [judged_renders(COUNT, 128, first)[0] for first in (0, 1_000)]


@pytest.fixture(scope="module")
def distance():
    return metrics.EncoderDistance(Base(inspect_base("ckpt/miniature")))


def soft(pictures):
    return F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")


def test_sharpness_is_that_of_the_metrics_and_falls_with_blur(renders):
    known, others = renders
    assert sharpness(known) == pytest.approx(
        sum(metrics.sharpness(from_array(picture.numpy())) for picture in known) / COUNT
    )
    assert sharpness(soft(known)) < 0.6 * sharpness(known)
    assert 0.8 < sharpness(others) / sharpness(known) < 1.25


def test_texture_is_nothing_for_the_same_and_grows_with_what_is_spoilt(renders, distance):
    known, others = (texture(distance, each) for each in renders)
    unit = texture_distance(known, others)
    assert texture_distance(known, known) == 0 < unit
    half, blur = (
        texture_distance(known, texture(distance, each))
        for each in ((renders[0] + soft(renders[0])) / 2, soft(renders[0]))
    )
    assert 0 < half < blur / 2


def test_texture_depends_on_no_order_of_pictures(renders, distance):
    known = texture(distance, renders[0])
    assert texture_distance(known, texture(distance, renders[0].flip(0))) < 1e-12
    assert known.shape[0] == 2 and known.isfinite().all()
