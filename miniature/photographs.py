"""Photographs for the autoencoder: random crops at several scales, in changed colours; and dead leaves.

There are few photographs. What stands in for the rest is the dead leaves model (Lee, Mumford and Huang 2001):
things that hide one another, of sizes r with density r^-3, which has the scale invariance and the edges of
natural images.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from lorakit.pictures.images import load_image
from miniature.fields import Array, fractal_noise, grid, step

FOLDER = Path(__file__).with_name("photos")
SCALES = (1.0, 0.71, 0.5, 0.35, 0.25)  # of the picture's own pixels


def pyramids(crop: int, folder: Path = FOLDER) -> list[list[Array]]:
    """Each photograph at the scales that still hold a crop, (H, W, 3) uint8."""
    found = []
    for path in sorted(folder.glob("*.jpg")):
        image = load_image(path)
        sizes = [(round(image.width * s), round(image.height * s)) for s in SCALES]
        levels = [image.resize(size, Image.Resampling.LANCZOS) for size in sizes if min(size) >= crop]
        found.append([np.asarray(level) for level in levels])
    assert len(found) >= 3, f"{folder} holds {len(found)} photographs"
    return found


def random_crop(rng: np.random.Generator, picture: Array, crop: int) -> Array:
    """(crop, crop, 3) uint8, mirrored half of the time."""
    height, width = picture.shape[:2]
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    part = picture[top : top + crop, left : left + crop]
    return part[:, ::-1] if rng.uniform() < 0.5 else part


def photograph_crop(rng: np.random.Generator, photographs: list[list[Array]], crop: int) -> Array:
    """A crop of a photograph at a random scale in random colours, turned at times; float32 in [0, 1]."""
    levels = photographs[int(rng.integers(len(photographs)))]
    part = random_crop(rng, levels[int(rng.integers(len(levels)))], crop)
    part = np.rot90(part, int(rng.integers(4))) if rng.uniform() < 0.25 else part
    return recoloured(rng, part.astype(np.float32) / 255)


def recoloured(rng: np.random.Generator, picture: Array) -> Array:
    """Changed gamma, contrast, saturation, white balance and, at times, hue."""
    picture = np.clip(picture, 0, 1) ** np.exp(rng.normal(0, 0.35))
    grey = picture.mean(axis=-1, keepdims=True)
    picture = grey + (picture - grey) * np.exp(rng.normal(0, 0.4))
    if rng.uniform() < 0.3:
        picture = picture[..., rng.permutation(3)]
    mean = picture.mean()
    picture = mean + (picture - mean) * np.exp(rng.normal(0, 0.25))
    return np.clip(picture * np.exp(rng.normal(0, 0.12, 3)), 0, 1).astype(np.float32)


def dead_leaves(rng: np.random.Generator, size: int, count: int = 220) -> Array:
    """Discs and slabs of textured colour over one another, (size, size, 3) float32 in [0, 1]."""
    y, x = grid(size)
    texture = fractal_noise(rng, (size, size), (6, 6), 5, gain=0.75)
    picture = np.full((size, size, 3), rng.uniform(0.1, 0.9, 3), np.float32)
    smallest, largest = 0.012, 0.5
    for _ in range(count):
        # Inverse of the distribution function of a density r^-3 between the smallest and the largest.
        r = (smallest**-2 - rng.uniform() * (smallest**-2 - largest**-2)) ** -0.5
        cy, cx, turn = *rng.uniform(-0.1, 1.1, 2), rng.uniform(0, np.pi)
        a = np.cos(turn) * (x - cx) + np.sin(turn) * (y - cy)
        b = (np.cos(turn) * (y - cy) - np.sin(turn) * (x - cx)) * rng.uniform(1.0, 2.5)
        reach = np.hypot(a, b) if rng.uniform() < 0.6 else np.maximum(np.abs(a), np.abs(b))
        alpha = step(r, r - rng.choice((0.004, 0.02)), reach)[..., None]
        leaf = (
            rng.uniform(0.05, 0.95, 3)
            + rng.uniform(0, 0.12) * texture[..., None]
            + 0.5 * (a / r)[..., None] * (rng.uniform(-0.2, 0.2, 3))
        )
        picture += (leaf - picture) * alpha
    return np.clip(picture, 0, 1).astype(np.float32)
