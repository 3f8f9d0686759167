"""Canny's edge detector on numpy (Canny 1986): a ControlNet's hint, and how alike edges are.

A picture is (H, W, 3) float32 in [0, 1], edges are (H, W) bool. Gradients are of brightness per pixel.
"""

from typing import TypeAlias

import numpy as np
from PIL import Image

Array: TypeAlias = np.ndarray

OPENCV_UNIT = 1 / (8 * 255)
"""One unit of OpenCV's thresholds as a gradient: its Sobel kernel sums to 8, its pixels go to 255."""


def canny(picture: Array, sigma: float = 1.0, low: float = 0.018, high: float = 0.045) -> Array:
    """Edges, (H, W) bool.

    Args:
        sigma: standard deviation of the blur, pixels; 0: none, as in OpenCV.
        low: gradient above which a pixel that touches an edge belongs to it.
        high: the gradient that an edge must reach somewhere.
    """
    strength, dx, dy = _gradient(picture, sigma)
    crest = _is_crest(strength, dx, dy)
    return _joined(crest & (strength > low), crest & (strength > high))


def auto_thresholds(picture: Array, sigma: float = 1.0) -> tuple[float, float]:
    """(low, high) for `canny` by the picture's own contrast: an edge is steeper than nine pixels in ten.

    Or than half the steepest, for in a line drawing more than a tenth is as steep as it gets. A floor of 0.01
    keeps noise from being the edges of a flat picture.
    """
    strength = _gradient(picture, sigma)[0]
    high = max(0.01, min(float(np.quantile(strength, 0.9)), float(strength.max()) / 2))
    return 0.4 * high, high


def _gradient(picture: Array, sigma: float) -> tuple[Array, Array, Array]:
    """Its length, and its parts to the right and downwards, by Sobel's kernels."""
    grey = picture @ np.array((0.299, 0.587, 0.114), np.float32)
    p = np.pad(_gaussian(grey, sigma) if sigma else grey, 1, mode="edge")
    dx = (p[:-2, 2:] - p[:-2, :-2] + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + p[2:, 2:] - p[2:, :-2]) / 8
    dy = (p[2:, :-2] - p[:-2, :-2] + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + p[2:, 2:] - p[:-2, 2:]) / 8
    return np.hypot(dx, dy), dx, dy


def _gaussian(grey: Array, sigma: float) -> Array:
    reach = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for _ in range(2):
        padded = np.pad(grey, ((reach, reach), (0, 0)), mode="edge")
        shifted = np.stack([padded[i : i + len(grey)] for i in range(len(kernel))])
        grey = np.tensordot(kernel, shifted, axes=1).T
    return grey


def _is_crest(strength: Array, dx: Array, dy: Array) -> Array:
    """Where the gradient is at least that of both neighbours along its direction, in steps of 45 degrees."""
    p = np.pad(strength, 1)
    direction = np.rint(np.arctan2(dy, dx) / (np.pi / 4)).astype(np.int64) % 4
    height, width = strength.shape
    crest = np.zeros(strength.shape, bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = p[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = p[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        crest |= (direction == number) & (strength >= ahead) & (strength > behind)
    return crest


def _joined(weak: Array, strong: Array) -> Array:
    """The strong pixels and the weak ones that a path of weak ones joins to them."""
    edges = strong
    while True:
        grown = weak & dilated(edges)
        if (grown == edges).all():
            return edges
        edges = grown


def dilated(mask: Array, times: int = 1) -> Array:
    """The mask and its eight neighbours, `times` over."""
    for _ in range(times):
        p = np.pad(mask, 1)
        rows = p[:-2] | p[1:-1] | p[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def edge_f1(hint: Array, found: Array, tolerance: int = 1) -> float:
    """Harmonic mean of precision and recall of edges, each within `tolerance` pixels of the other's.

    1 where both are empty, 0 where one is.
    """
    if not hint.any() or not found.any():
        return float(hint.any() == found.any())
    precision = (found & dilated(hint, tolerance)).sum() / found.sum()
    recall = (hint & dilated(found, tolerance)).sum() / hint.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def hint_picture(edges: Array) -> Array:
    """White lines on black, (3, H, W) float32 in [0, 1]: what a ControlNet takes."""
    return np.broadcast_to(edges.astype(np.float32), (3, *edges.shape)).copy()


def edge_image(edges: Array) -> Image.Image:
    """The same as an RGB picture."""
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def as_floats(image: Image.Image) -> Array:
    """(H, W, 3) float32 in [0, 1]."""
    return np.asarray(image.convert("RGB"), np.float32) / 255
