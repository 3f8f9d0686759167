"""From a picture's latents to the noise that leads back to them, by six methods.

Everything runs on a Grid of nodes 0 (noise) … n (picture) and a `Predict`, so that it is the same for the
pipeline, for morphs, and for tests on an analytic denoiser. Latents are (B, C, h, w).

ddim         DDIM backwards (Song et al. 2021, sec. 4.3): the noise is evaluated at the wrong end of a step
ab2          the noise where the latents are, carried on by the change since the last step; back the same way
fixed_point  as ddim, iterated until both ends agree (AIDI, Pan et al. 2023; ReNoise, Garibi et al. 2024)
obelm        O-BELM (Wang et al. 2024): exact by algebra, if two neighbouring latents are kept
null_text    null-text optimization (Mokady et al. 2023): negative embeddings that lead back under guidance
anchored     DDIM's path, and what each sampling step misses it by (after PnP inversion, Ju et al. 2024)
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorakit.diffusion.schedule import Grid, ddim_step

Predict = Callable[[Tensor, int], Tensor]  # noisy latents, timestep -> noise, all in the dtype of the latents


def invert(latents: Tensor, grid: Grid, predict: Predict, iterations: int = 0) -> Iterator[Tensor]:
    """The latents of nodes n - 1 … 0, from those of the picture; with `iterations` the fixed point is sought.

    n evaluations; with K iterations up to n (K + 2), fewer where the residual stops falling earlier. On a
    grid of ab2 no fixed point is sought, and there are n + 1 evaluations.
    """
    if grid.solver == "ab2":
        yield from _invert_ab2(latents, grid, predict)
        return
    for i in reversed(range(len(grid))):
        timestep, here, clean = grid.timesteps[i], grid.alpha_bar[i], grid.alpha_bar[i + 1]
        noisier = ddim_step(latents, predict(latents, timestep), clean, here)
        if iterations:
            noisier = _fixed_point(noisier, latents, predict, timestep, here, clean, iterations)
        latents = noisier
        yield latents


def _invert_ab2(latents: Tensor, grid: Grid, predict: Predict) -> Iterator[Tensor]:
    """The way back walked from its other end.

    From timestep 1 on steps are wide, and the one before, from 0 to 1, tells nothing of how noise changes:
    the first of them goes along the mean of its two ends (Heun), one evaluation more.
    """
    back, before = grid.backwards(), None
    for i, timestep in enumerate(back.timesteps):
        levels = back.alpha_bar[i], back.alpha_bar[i + 1]
        epsilon = predict(latents, timestep)
        along = back.along(i, epsilon, before)
        if i == 1:
            ahead = predict(ddim_step(latents, along, *levels), grid.timesteps[-2])
            along = (epsilon + ahead) / 2
        latents, before = ddim_step(latents, along, *levels), epsilon
        yield latents


def _fixed_point(
    start: Tensor, target: Tensor, predict: Predict, timestep: int, here: float, clean: float, iterations: int
) -> Tensor:
    """The iterate y whose sampling step comes nearest to `target`, row by row.

    y <- step(target, eps(y)) need not contract. So each iterate is judged by |step(y, eps(y)) - target|,
    which costs no further evaluation, and a row's search ends with the first that is no better.
    """
    dims = tuple(range(1, start.ndim))
    best, least = start, torch.full((len(start),), math.inf, dtype=start.dtype, device=start.device)
    candidate, better = start, torch.ones_like(least, dtype=torch.bool)
    for _ in range(iterations + 1):
        epsilon = predict(candidate, timestep)
        residual = (ddim_step(candidate, epsilon, here, clean) - target).square().sum(dims)
        better = better & (residual < least)
        if not better.any():
            break
        best = torch.where(better.view(-1, *[1] * len(dims)), candidate, best)
        least = torch.where(better, residual, least)
        candidate = ddim_step(target, epsilon, clean, here)
    return best


def sample(latents: Tensor, grid: Grid, predict: Predict) -> Iterator[Tensor]:
    """The latents of nodes 1 … n, from those of node 0, by the grid's solver."""
    before = None
    for i, timestep in enumerate(grid.timesteps):
        epsilon = predict(latents, timestep)
        along = grid.along(i, epsilon, before)
        latents, before = ddim_step(latents, along, grid.alpha_bar[i], grid.alpha_bar[i + 1]), epsilon
        yield latents


def sample_anchored(trajectory: Tensor, grid: Grid, source: Predict, predict: Predict) -> Iterator[Tensor]:
    """`edit_anchored` from noise, with a pass for each of the two; 2 n evaluations of each row."""
    return edit_anchored(trajectory, grid, lambda own, x, t: (source(own, t), predict(x, t)))


def edit_anchored(
    trajectory: Tensor,
    grid: Grid,
    predict: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    *,
    start: int = 0,
    latents: Tensor | None = None,
    where: Tensor | None = None,
    share: float = 1.0,
) -> Iterator[Tensor]:
    """The latents (R, C, h, w) of nodes start + 1 … n, corrected by what the source misses `trajectory` by.

    z_{i+1} = step(z_i) + share d_i, d_i = z*_{i+1} - step(z*_i), for any trajectory z* (n + 1, B, C, h, w).

    With one noise for both this is the trajectory itself; with another prompt it is an edit that keeps what
    the prompts have in common.

    Args:
        predict: (z*_i, z_i, timestep) -> the noise of both, which may so be of one batch.
        latents: of node `start`; None: the trajectory's own.
        where: (R or 1, 1, h, w), 0 where the trajectory is kept, 1 where it is left.
    """
    latents, before = trajectory[start] if latents is None else latents, (None, None)
    for i in range(start, len(grid)):
        levels = grid.alpha_bar[i], grid.alpha_bar[i + 1]
        noises = predict(trajectory[i], latents, grid.timesteps[i])
        along = [grid.along(i, noise, last) for noise, last in zip(noises, before, strict=True)]
        own, before = ddim_step(trajectory[i], along[0], *levels), noises
        # The difference first: rounding that n steps would amplify is nil where source and predict agree.
        moved = ddim_step(latents, along[1], *levels) - own
        if where is not None:  # what lies outside is put back on its own path
            moved = where * moved
        anchor = trajectory[i + 1]
        if share != 1:
            anchor = own + share * (anchor - own)
        latents = anchor + moved
        yield latents


# ---- O-BELM ----


def _belm_factors(grid: Grid, i: int) -> tuple[float, float, float]:
    """(p, q, r) of x_{i+1} = p x_{i-1} + q x_i - r eps(x_i) (Wang et al. 2024).

    With A = sqrt(alpha_bar), s = sqrt((1 - alpha_bar) / alpha_bar), h = s_i - s_{i+1} and g = s_{i-1} - s_i.
    """
    root = [math.sqrt(grid.alpha_bar[j]) for j in (i - 1, i, i + 1)]
    sigma = [math.sqrt((1 - grid.alpha_bar[j]) / grid.alpha_bar[j]) for j in (i - 1, i, i + 1)]
    h, g = sigma[1] - sigma[2], sigma[0] - sigma[1]
    p = (h / g) ** 2 * root[2] / root[0]
    q = (g**2 - h**2) / g**2 * root[2] / root[1]
    return p, q, h * (h + g) / g * root[2]


def invert_obelm(latents: Tensor, grid: Grid, predict: Predict) -> Iterator[Tensor]:
    """The latents of nodes n - 1 … 0. The last two together are the code; n evaluations; use float64."""
    after = latents
    (current,) = invert(latents, Grid(grid.timesteps[-1:], grid.alpha_bar[-2:]), predict)
    yield current
    for i in reversed(range(1, len(grid))):
        p, q, r = _belm_factors(grid, i)
        before = (after - q * current + r * predict(current, grid.timesteps[i])) / p
        after, current = current, before
        yield current


def sample_obelm(pair: tuple[Tensor, Tensor], grid: Grid, predict: Predict) -> Iterator[Tensor]:
    """The latents of nodes 2 … n, from those of nodes 0 and 1; n - 1 evaluations; use float64."""
    before, current = pair
    for i in range(1, len(grid)):
        p, q, r = _belm_factors(grid, i)
        epsilon = predict(current, grid.timesteps[i])
        before, current = current, p * before + q * current - r * epsilon
        yield current


# ---- null-text ----


def null_text(
    trajectory: Tensor,
    grid: Grid,
    predict: Callable[[Tensor, int, Tensor], Tensor],
    conditional: Predict,
    negative_embeds: Tensor,
    guidance_scale: float,
    iterations: int = 10,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the negative embeddings (1, L, D) that lead back to `trajectory`, and its latents.

    Adam, rate 1e-2 (1 - i / 2n), at most K updates, ending below 1e-5 + 2e-5 i: the constants of Mokady et
    al. 2023 at n = 50. One picture at a time. n (K + 2) evaluations, and n K backward passes, at most.

    Args:
        trajectory: (n + 1, 1, C, h, w), inverted at guidance 1.
        predict: noise from latents, timestep and negative embeddings, with gradients.
        conditional: noise under the prompt.
    """
    steps, latents, embeds = len(grid), trajectory[0], negative_embeds
    for i, timestep in enumerate(grid.timesteps):
        levels = grid.alpha_bar[i], grid.alpha_bar[i + 1]
        with torch.no_grad():
            positive = conditional(latents, timestep)

        def guided(embeds: Tensor, at=latents, timestep=timestep, positive=positive, levels=levels) -> Tensor:
            negative = predict(at, timestep, embeds)
            return ddim_step(at, negative + guidance_scale * (positive - negative), *levels)

        with torch.enable_grad():
            embeds = embeds.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([embeds], lr=1e-2 * (1 - i / (2 * steps)))
            for _ in range(iterations):
                loss = (guided(embeds) - trajectory[i + 1]).square().mean()
                if loss.item() < 1e-5 + 2e-5 * i * 50 / steps:
                    break
                (embeds.grad,) = torch.autograd.grad(loss, embeds)
                optimizer.step()
        embeds = embeds.detach()
        with torch.no_grad():
            latents = guided(embeds)
        yield embeds, latents
