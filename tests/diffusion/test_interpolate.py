"""Between two pictures: what holds at the ends, on the arc, and where the arc is not defined."""

import pytest
import torch

from lorakit.diffusion.interpolate import adain, bezier, slerp

SHAPE = (3, 4, 6, 5)
ALPHA = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def pair(seed=0, shape=SHAPE, dtype=torch.float32):
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def norms(x):
    return x.double().flatten(1).norm(dim=1)


# ---- slerp ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_of_the_arc_are_exact_to_the_bit(dtype):
    a, b = pair(dtype=dtype)
    assert torch.equal(slerp(a, b, torch.zeros(3)), a) and torch.equal(slerp(a, b, torch.ones(3)), b)
    assert slerp(a, b, torch.full((3,), 0.5)).dtype == dtype
    assert not torch.equal(slerp(a, b, torch.full((3,), 0.99)), b)


@pytest.mark.parametrize("seed", range(3))
def test_vectors_of_one_norm_keep_it_and_turn_evenly(seed):
    a, b = pair(seed, dtype=torch.float64)
    a, b = (x / norms(x).view(-1, 1, 1, 1) for x in (a, b))
    angle = torch.arccos((a * b).flatten(1).sum(1))
    for alpha in torch.linspace(0, 1, 7, dtype=torch.float64):
        there = slerp(a, b, alpha.expand(3))
        torch.testing.assert_close(norms(there), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
        turned = torch.arccos((a * there).flatten(1).sum(1).clamp(-1, 1))
        torch.testing.assert_close(turned, alpha * angle, rtol=0, atol=1e-6)
    assert (norms((a + b) / 2) < 0.9).all()  # the straight line does not keep it


def test_halfway_between_noises_is_noise():
    a, b = pair(1, (3, 4, 32, 32))
    half = torch.full((3,), 0.5)
    assert abs(slerp(a, b, half).std() - 1) < 0.02
    assert abs(torch.lerp(a, b, 0.5).std() - 1) > 0.25


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-7, 2.0, -1.0])
def test_parallel_and_opposite_vectors_give_the_straight_line(factor):
    a, _ = pair()
    b = factor * a
    for alpha in (0.0, 0.25, 1.0):
        found = slerp(a, b, torch.full((3,), alpha))
        torch.testing.assert_close(found, torch.lerp(a, b, alpha), rtol=1e-6, atol=1e-6)
    zero = torch.zeros_like(a)
    assert torch.equal(slerp(zero, zero, ALPHA), zero) and slerp(a, zero, ALPHA).isfinite().all()


def test_rows_are_independent_each_with_its_own_alpha():
    a, b = pair(2)
    b[1] = a[1]  # a row that takes the straight line leaves the others on their arcs
    rows = [slerp(a[i : i + 1], b[i : i + 1], ALPHA[i : i + 1]) for i in range(3)]
    assert torch.equal(slerp(a, b, ALPHA), torch.cat(rows))
    assert not torch.equal(slerp(a, b, ALPHA.flip(0)), torch.cat(rows))


# ---- adain ----


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7])
def test_adain_gives_each_channel_the_statistics_in_between(alpha):
    a, b = pair(3)
    a, b = 2 * a + 1, 0.5 * b - 3
    mixed = slerp(a, b, torch.full((3,), alpha))
    moved = adain(mixed, a, b, torch.full((3,), alpha))
    for statistic in (torch.mean, torch.std):
        wanted = (1 - alpha) * statistic(a, dim=(2, 3)) + alpha * statistic(b, dim=(2, 3))
        torch.testing.assert_close(statistic(moved, dim=(2, 3)), wanted, rtol=1e-4, atol=1e-4)
        assert (statistic(mixed, dim=(2, 3)) - wanted).abs().max() > 0.1


def test_adain_keeps_the_pattern_and_leaves_the_ends_alone():
    a, b = pair(4)
    alpha = torch.tensor([0.0, 0.4, 1.0])
    latents = slerp(a, b, alpha)
    moved = adain(latents, 3 * a, 3 * b, alpha)
    assert torch.equal(moved[0], a[0]) and torch.equal(moved[2], b[2])
    assert (moved[1] - latents[1]).abs().max() > 0.1
    together = torch.stack([latents[1].flatten(1)[0], moved[1].flatten(1)[0]])
    assert torch.corrcoef(together)[0, 1] > 1 - 1e-5


def test_adain_of_a_flat_channel_is_finite():
    a, b = pair(5)
    assert adain(torch.zeros(SHAPE), a, b, ALPHA).isfinite().all()


# ---- prompts ----


def test_prompts_go_along_the_line_or_bow_towards_the_control():
    a, b = pair(6, (3, 7, 8))
    control = torch.full((7, 8), 5.0)
    weight = ALPHA.float().view(-1, 1, 1)
    torch.testing.assert_close(bezier(a, b, ALPHA), torch.lerp(a, b, weight), rtol=1e-5, atol=1e-6)
    bowed = bezier(a, b, ALPHA, control)
    towards = (1 - weight) ** 2 * a + 2 * weight * (1 - weight) * control + weight**2 * b
    torch.testing.assert_close(bowed, towards, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bowed[1], 0.25 * a[1] + 0.5 * control + 0.25 * b[1], rtol=1e-5, atol=1e-6)
    assert (bowed[1] - control).norm() < 0.6 * (torch.lerp(a, b, 0.5)[1] - control).norm()
    for end, wanted in ((torch.zeros(3), a), (torch.ones(3), b)):
        assert torch.equal(bezier(a, b, end), wanted) and torch.equal(bezier(a, b, end, control), wanted)


def test_a_control_in_the_middle_is_the_line():
    a, b = pair(7, (3, 7, 8))
    for i in range(3):
        at = slice(i, i + 1)
        middle = (a[i] + b[i]) / 2
        torch.testing.assert_close(
            bezier(a[at], b[at], ALPHA[at], middle), bezier(a[at], b[at], ALPHA[at]), rtol=1e-5, atol=1e-5
        )
