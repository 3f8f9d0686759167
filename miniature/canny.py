"""Canny's edge detector on numpy (Canny 1986), as the hint of the miniature's ControlNet."""

import numpy as np

from miniature.fields import Array


def canny(picture: Array, sigma: float = 1.0, low: float = 0.018, high: float = 0.045) -> Array:
    """Edges, (H, W) bool.

    Args:
        picture: (H, W, 3) in [0, 1].
        sigma: standard deviation of the blur, pixels.
        low: gradient of brightness per pixel above which a pixel that touches an edge belongs to it.
        high: the gradient that an edge must reach somewhere.
    """
    grey = _gaussian(picture @ np.array((0.299, 0.587, 0.114), np.float32), sigma)
    p = np.pad(grey, 1, mode="edge")
    # Sobel, scaled to brightness per pixel
    dx = (p[:-2, 2:] - p[:-2, :-2] + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + p[2:, 2:] - p[2:, :-2]) / 8
    dy = (p[2:, :-2] - p[:-2, :-2] + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + p[2:, 2:] - p[:-2, 2:]) / 8
    strength = np.hypot(dx, dy)
    crest = _is_crest(strength, dx, dy)
    return _joined(crest & (strength > low), crest & (strength > high))


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
