"""Between two pictures: latents, their statistics and prompt embeddings. `alpha` runs from 0 to 1."""

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """Spherical interpolation of whole latents (Shoemake 1985): (B, …) from a and b (B, …), alpha (B,).

    sin((1 - alpha) phi) / sin(phi) a + sin(alpha phi) / sin(phi) b, with phi the angle between the two, each
    flattened; in float64. Where they are nearly parallel, or opposite so that no arc is the shortest, the
    straight line is taken. alpha 0 and 1 return a and b to the bit.
    """
    assert a.shape == b.shape and alpha.shape == a.shape[:1], (a.shape, b.shape, alpha.shape)
    first, second, weight = a.double(), b.double(), _column(alpha.double(), a)
    dims = tuple(range(1, a.ndim))
    norms = first.square().sum(dims, keepdim=True).sqrt() * second.square().sum(dims, keepdim=True).sqrt()
    cosine = (first * second).sum(dims, keepdim=True) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    phi = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(phi)
    straight = sine < 1e-6
    sine = torch.where(straight, torch.ones_like(sine), sine)
    left = torch.where(straight, 1 - weight, torch.sin((1 - weight) * phi) / sine)
    right = torch.where(straight, weight, torch.sin(weight * phi) / sine)
    mixed = (left * first + right * second).to(a.dtype)
    mixed = torch.where(_column(alpha == 0, a), a, mixed)
    return torch.where(_column(alpha == 1, a), b, mixed)


def adain(latents: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """Gives `latents` (B, C, h, w) the mean and deviation per channel that lie between those of a and b.

    DiffMorpher (Zhang et al. 2024, eqs. 8-10), after Huang & Belongie 2017. Applied to the noise latents: it
    keeps colours from fading halfway. Leaves alpha 0 and 1 as they are, for there a and b are the statistics.
    """
    dims = (-2, -1)
    weight = _column(alpha.to(latents), latents)

    def between(statistic) -> Tensor:
        return (1 - weight) * statistic(a) + weight * statistic(b)

    mean = between(lambda x: x.mean(dims, keepdim=True))
    deviation = between(lambda x: x.std(dims, keepdim=True))
    own_mean, own_deviation = latents.mean(dims, keepdim=True), latents.std(dims, keepdim=True)
    moved = (latents - own_mean) / own_deviation.clamp_min(1e-5) * deviation + mean
    return torch.where((weight == 0) | (weight == 1), latents, moved)


def bezier(a: Tensor, b: Tensor, alpha: Tensor, control: Tensor | None = None) -> Tensor:
    """Prompt embeddings (B, L, D) between a and b: the straight line, or a bow towards `control` (L, D).

    (1 - alpha)^2 a + 2 alpha (1 - alpha) control + alpha^2 b; without control its middle stands for it, which
    is the line. The ends are a and b whatever the control.
    """
    weight = _column(alpha.to(a), a)
    if control is None:
        return (1 - weight) * a + weight * b
    return (1 - weight).square() * a + 2 * weight * (1 - weight) * control + weight.square() * b


def _column(alpha: Tensor, like: Tensor) -> Tensor:
    return alpha.to(like.device).view(-1, *[1] * (like.ndim - 1))
