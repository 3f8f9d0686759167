"""Where in a picture a patch of another is found again, by normalized correlation of colours. No torch."""

import numpy as np

from lorakit.pictures.warping import Array, Point


def find_again(picture: Array, before: Array, place: Point, radius: int, where: Array) -> tuple[Point, float]:
    """The place of `picture` whose surroundings are most like those of `place` in `before`; how much, to 1.

    Args:
        picture, before: (H, W, C) float32.
        radius: of the square that is compared; what of it lies outside the picture is its rim, going on.
        where: (H, W) bool, where to look.

    A place is (x, y), the middle of the first pixel (0.5, 0.5); what is found is the middle of one, moved by
    what `place` is off the middle of its own.
    """
    (x, y), side = place, 2 * radius + 1
    row, column = int(y), int(x)
    pad = ((radius, radius), (radius, radius), (0, 0))
    old, new = (np.pad(each.astype(np.float64), pad, mode="edge") for each in (before, picture))
    patch = old[row : row + side, column : column + side]
    patch = patch - patch.mean((0, 1))
    size = new.shape[:2]
    spectra = np.fft.rfft2(new, axes=(0, 1)) * np.conj(np.fft.rfft2(patch, size, axes=(0, 1)))
    alike = np.fft.irfft2(spectra, size, axes=(0, 1)).sum(2)[: where.shape[0], : where.shape[1]]
    variance = (_boxes(new**2, side) - _boxes(new, side) ** 2 / side**2).sum(2)
    score = alike / np.sqrt(np.maximum(variance * (patch**2).sum(), 1e-12))
    best = np.unravel_index(np.where(where, score, -np.inf).argmax(), where.shape)
    return (float(best[1] + x - column), float(best[0] + y - row)), float(score[best])


def _boxes(values: Array, side: int) -> Array:
    """Sums over all squares of `side`, (H - side + 1, W - side + 1, C)."""
    total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    return total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
