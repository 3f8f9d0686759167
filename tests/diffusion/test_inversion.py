"""Inversion methods on a tiny U-Net, and on Gaussian data, where noise and path are known.

For x_0 ~ N(mu, s^2) the best denoiser is eps(x_t) = sqrt(1 - a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a), with
a = alpha_bar of t, and its flow takes x_0 to sqrt(a) mu + sqrt((a s^2 + 1 - a) / s^2) (x_0 - mu).
"""

import copy
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.schedule import Grid, NoiseSchedule, ddim_step

SCHEDULE = NoiseSchedule.from_scheduler(
    DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
MEAN, SPREAD = 0.7, 0.4


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def gaussian(x, t):
    a = float(SCHEDULE.alpha_bar[t])
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * SPREAD**2 + 1 - a)


def flow(x, a_from, a_to):
    """The exact path of Gaussian data from one noise level to another."""
    spread = [math.sqrt(a * SPREAD**2 + 1 - a) for a in (a_from, a_to)]
    return math.sqrt(a_to) * MEAN + spread[1] / spread[0] * (x - math.sqrt(a_from) * MEAN)


def latents(count=2, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return MEAN + SPREAD * torch.randn(count, 4, 8, 8, generator=rng, dtype=torch.float64).to(dtype)


def path_of(steps, clean):
    return torch.stack([clean, *steps]).flip(0)


def last(steps):
    return list(steps)[-1]


class Nearly:
    """A U-Net that predicts the noise of Gaussian data, and a tenth of what its random weights say.

    A random U-Net alone denoises nothing: a path under it is chaos, in which DDIM misses by more than 100 %.
    """

    share = 0.1

    def __init__(self, unet):
        self.unet = unet

    def __getattr__(self, name):
        return getattr(self.unet, name)

    def __call__(self, x, t, **options):
        return (gaussian(x, t) + self.share * self.unet(x, t, **options)[0],)


@pytest.fixture(scope="module")
def network(tiny_unet):
    """Factory of (predict, denoiser, rows): the tiny U-Net beside the denoiser of Gaussian data."""
    model = tiny_unet()

    def make(count=2, scale=1.0, dtype=torch.float64, wrap=Nearly, schedule=SCHEDULE):
        rng = torch.Generator().manual_seed(5)
        embeds, negative = torch.randn(2, count, 5, 16, generator=rng)
        rows = Rows(embeds, negative, torch.zeros(count, 0))
        denoiser = Denoiser(wrap(copy.deepcopy(model).to(dtype)), schedule)
        return lambda x, t: denoiser(x, t, rows, scale), denoiser, rows

    return make


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ---- DDIM ----


def test_ddim_finds_the_exact_noise_of_gaussian_data_at_order_1():
    clean, errors = latents(), []
    for n in (25, 50, 100, 200):
        grid = SCHEDULE.grid(n)
        noise = last(inversion.invert(clean, grid, gaussian))
        errors.append(relative(noise, flow(clean, grid.alpha_bar[-1], grid.alpha_bar[0])))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.8 < order < 1.2 for order in orders), (errors, orders)
    wrong = last(inversion.invert(clean, grid, lambda x, t: 1.05 * gaussian(x, t)))
    assert relative(wrong, flow(clean, grid.alpha_bar[-1], grid.alpha_bar[0])) > 5 * errors[-1]


def test_there_and_back_misses_the_picture_by_order_1():
    clean, errors = latents(), []
    for n in (25, 50, 100, 200):
        grid = SCHEDULE.grid(n)
        noise = last(inversion.invert(clean, grid, gaussian))
        errors.append(relative(last(inversion.sample(noise, grid, gaussian)), clean))
    assert all(0.8 < math.log2(a / b) < 1.2 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(("solver", "low", "high"), [("ddim", 1.5, 2.5), ("ab2", 3.2, 6.0)])
@pytest.mark.parametrize("way", ["back", "there"])
def test_what_a_solver_misses_falls_with_the_steps_as_its_order_says(solver, way, low, high):
    """Gaussian data have a known path; twice the steps make a half of the error, or a quarter."""

    def missed(steps, solver=solver):
        grid = SCHEDULE.grid(steps, solver)
        noise = flow(latents(), grid.alpha_bar[-1], grid.alpha_bar[0])
        if way == "there":
            return float((last(inversion.invert(latents(), grid, gaussian)) - noise).abs().mean())
        return float((last(inversion.sample(noise, grid, gaussian)) - latents()).abs().mean())

    if (solver, way) == ("ab2", "there"):
        low = 2.5  # the first wide step is one of another kind
    assert low < missed(10) / missed(20) < high
    assert solver == "ddim" or missed(20) < missed(50, "ddim") / 2


def test_ab2_comes_back_better_from_a_third_of_the_steps():
    clean = latents()

    def missed(steps, there, back):
        noise = last(inversion.invert(clean, SCHEDULE.grid(steps, there), gaussian))
        return relative(last(inversion.sample(noise, SCHEDULE.grid(steps, back), gaussian)), clean)

    ddim, ab2 = missed(50, "ddim", "ddim"), missed(50, "ab2", "ab2")
    assert missed(16, "ab2", "ab2") < ddim and ab2 < ddim / 10
    assert min(missed(50, "ddim", "ab2"), missed(50, "ab2", "ddim")) > 10 * ab2  # either way alone is no help


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ab2_evaluates_one_row_more_than_it_takes_steps(steps):
    seen: list[int] = []

    def predict(x, timestep):
        seen.append(timestep)
        return gaussian(x, timestep)

    grid = SCHEDULE.grid(steps, "ab2")
    assert len(list(inversion.invert(latents(), grid, predict))) == steps
    assert seen[0] == 0 and len(seen) == (steps + 1 if steps > 1 else 1)


def test_one_latent_is_given_for_each_step_and_one_evaluation_spent(network):
    predict, denoiser, _ = network()
    grid = SCHEDULE.grid(7)
    steps = list(inversion.invert(latents(), grid, predict))
    assert len(steps) == 7 and denoiser.evaluations == 7 * 2
    assert len(list(inversion.sample(steps[-1], grid, predict))) == 7 and denoiser.evaluations == 14 * 2


# ---- fixed point ----


def residual(noisier, target, predict, grid):
    """How far the sampling step of a grid of one step ends from its target, for each row."""
    epsilon = predict(noisier, grid.timesteps[0])
    return (ddim_step(noisier, epsilon, *grid.alpha_bar) - target).flatten(1).norm(dim=1)


def one_step(i, n=20):
    grid = SCHEDULE.grid(n)
    return Grid(grid.timesteps[i : i + 1], grid.alpha_bar[i : i + 2])


@pytest.mark.parametrize("i", [0, 5, 12, 19])
@pytest.mark.parametrize("kind", ["gaussian", "network", "strong"])
def test_a_fixed_point_never_misses_by_more_than_ddim(network, i, kind):
    predict = {
        "gaussian": lambda: gaussian,
        "network": lambda: network()[0],
        "strong": lambda: lambda x, t: 40 * torch.sin(40 * x),  # no contraction, not even nearly
    }[kind]()
    grid, target = one_step(i), latents(seed=i)
    missed = {
        k: residual(last(inversion.invert(target, grid, predict, k)), target, predict, grid)
        for k in (0, 1, 3, 8)
    }
    assert all(x.isfinite().all() for x in missed.values())
    for few, many in itertools.pairwise((0, 1, 3, 8)):
        assert (missed[many] <= missed[few] * (1 + 1e-9) + 1e-12).all()
    if kind != "strong":
        assert (missed[8] < 0.05 * missed[0] + 1e-10).all()


def test_without_the_guard_an_iteration_that_does_not_contract_is_worse_than_ddim():
    """What the guard is for: the plain iteration of the literature, on the denoiser that is too strong."""

    grid, target = one_step(5), latents()
    gain = 3 / float(ddim_step(torch.zeros(1), torch.ones(1), *grid.alpha_bar[::-1]))

    def strong(x, t):
        return gain * x  # threefold from iterate to iterate

    start = y = last(inversion.invert(target, grid, strong))
    plain = []
    for _ in range(8):
        y = ddim_step(target, strong(y, grid.timesteps[0]), *grid.alpha_bar[::-1])
        plain.append(residual(y, target, strong, grid))
    guarded = residual(last(inversion.invert(target, grid, strong, 8)), target, strong, grid)
    assert (guarded <= residual(start, target, strong, grid)).all()
    assert all((x > guarded).all() for x in plain)
    assert (plain[-1] > 100 * residual(start, target, strong, grid)).all()


def test_a_fixed_point_is_found_row_by_row():
    """Rows that contract at other speeds, so that their searches end at other iterations."""
    gains = torch.tensor([0.0, 1.0, 60.0], dtype=torch.float64).view(3, 1, 1, 1)

    def predict(x, t, gains=gains):
        return gains * torch.tanh(x)

    grid, clean = SCHEDULE.grid(10), latents(3)
    together = path_of(inversion.invert(clean, grid, predict, 5), clean)
    for i in range(3):
        at = slice(i, i + 1)

        def single(x, t, gain=gains[at]):
            return gain * torch.tanh(x)

        alone = path_of(inversion.invert(clean[at], grid, single, 5), clean[at])
        torch.testing.assert_close(together[:, at], alone, rtol=1e-12, atol=1e-12)
    plain = path_of(inversion.invert(clean, grid, predict), clean)
    changed = (together - plain).flatten(2).norm(dim=2).amax(0) > 1e-9
    assert changed.tolist()[:2] == [False, True]


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    def predict(x, t):
        return torch.where(torch.arange(2).view(2, 1, 1, 1) == 1, torch.nan, gaussian(x, t))

    grid, clean = SCHEDULE.grid(5), latents()
    found = last(inversion.invert(clean, grid, predict, 3))
    assert torch.equal(found[:1], last(inversion.invert(clean[:1], grid, gaussian, 3)))


def test_the_fixed_point_reconstructs_better_within_its_budget(network):
    predict, denoiser, _ = network()
    grid, clean = SCHEDULE.grid(20), latents()
    errors = {}
    for iterations in (0, 3):
        before = denoiser.evaluations
        noise = last(inversion.invert(clean, grid, predict, iterations))
        assert denoiser.evaluations - before <= (20 * (iterations + 2) if iterations else 20) * len(clean)
        errors[iterations] = relative(last(inversion.sample(noise, grid, predict)), clean)
    assert errors[3] < 0.1 * errors[0]


# ---- O-BELM ----


@pytest.mark.parametrize("n", [2, 10, 50])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_obelm_is_exact_with_two_latents_and_not_with_one(network, n, scale):
    predict, denoiser, _ = network(scale=scale)
    grid, clean = SCHEDULE.grid(n), latents()
    path = path_of(inversion.invert_obelm(clean, grid, predict), clean)
    assert len(path) == n + 1 and denoiser.evaluations == n * len(clean) * (1 + (scale != 1))
    again = last(inversion.sample_obelm((path[0], path[1]), grid, predict))
    torch.testing.assert_close(again, clean, rtol=0, atol=1e-10)
    # The usual misuse: keep the noise alone, and begin with a step of DDIM.
    second = ddim_step(path[0], predict(path[0], grid.timesteps[0]), *grid.alpha_bar[:2])
    misused = last(inversion.sample_obelm((path[0], second), grid, predict))
    assert (misused - clean).abs().max() > 1e-4


def test_obelm_is_of_higher_order_than_ddim():
    grid, clean = SCHEDULE.grid(100), latents()
    exact = flow(clean, grid.alpha_bar[-1], grid.alpha_bar[0])
    ddim = relative(last(inversion.invert(clean, grid, gaussian)), exact)
    assert relative(last(inversion.invert_obelm(clean, grid, gaussian)), exact) < 0.5 * ddim


# ---- anchored ----


@pytest.mark.parametrize("n", [1, 10, 50])
@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_anchored_residuals_are_exact_at_any_guidance(network, n, scale):
    predict, _, _ = network(scale=scale, dtype=torch.float32)
    grid, clean = SCHEDULE.grid(n), latents(dtype=torch.float32)
    path = path_of(inversion.invert(clean, grid, predict), clean)
    again = list(inversion.sample_anchored(path, grid, predict, predict))
    assert len(again) == n
    assert torch.equal(torch.stack(again), path[1:])
    missed = last(inversion.sample(path[0], grid, predict)) - clean
    assert missed.abs().max() > (1e-2 if n > 1 else 1e-6)


def test_anchoring_any_path_follows_it_even_one_that_was_never_inverted(network):
    predict, _, _ = network()
    grid = SCHEDULE.grid(10)
    path = torch.randn(11, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    again = last(inversion.sample_anchored(path, grid, predict, predict))
    torch.testing.assert_close(again, path[-1], rtol=0, atol=1e-10)
    other, _, _ = network(scale=3.0)
    assert (last(inversion.sample_anchored(path, grid, predict, other)) - path[-1]).abs().max() > 1e-3


def test_anchoring_starts_at_any_node_and_takes_both_in_one_batch(network):
    _, denoiser, rows = network()
    other = Rows(rows.prompt_embeds.flip(0), rows.negative_embeds, rows.weights)
    grid, clean = SCHEDULE.grid(10), latents()
    path = path_of(inversion.invert(clean, grid, lambda x, t: denoiser(x, t, rows)), clean)
    both = join_rows([rows, other])

    def predict(own, x, timestep):
        return denoiser(torch.cat([own, x]), timestep, both).chunk(2)

    for start in (0, 4, 9):
        before = denoiser.evaluations
        found = list(inversion.edit_anchored(path, grid, predict, start=start))
        assert len(found) == 10 - start and denoiser.evaluations - before == 4 * (10 - start)
        two = inversion.sample_anchored(
            path[start:],
            Grid(grid.timesteps[start:], grid.alpha_bar[start:]),
            lambda x, t: denoiser(x, t, rows),
            lambda x, t: denoiser(x, t, other),
        )
        torch.testing.assert_close(found[-1], last(two), rtol=0, atol=1e-10)
    moved = path[4] + 0.1
    away = last(inversion.edit_anchored(path, grid, predict, start=4, latents=moved))
    again = last(inversion.edit_anchored(path, grid, predict, start=4))
    assert (away - again).abs().max() > 1e-3


def test_outside_of_where_the_path_is_kept_to_the_bit(network):
    _, denoiser, rows = network()
    grid, clean = SCHEDULE.grid(6), latents()
    path = path_of(inversion.invert(clean, grid, lambda x, t: denoiser(x, t, rows)), clean)
    where = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    where[..., 2:6, 2:6] = 1

    def edited(where):
        def predict(own, x, timestep):
            return denoiser(own, timestep, rows), denoiser(x, timestep, rows, 3.0)

        return last(inversion.edit_anchored(path, grid, predict, where=where))

    found, everywhere, inside = edited(where), edited(None), where.expand_as(clean) > 0
    assert torch.equal(found[~inside], clean[~inside])
    assert (found[inside] - clean[inside]).abs().max() > 1e-3 and (everywhere != clean).all()


# ---- null-text ----


class Swayed(Nearly):
    share = 1.0  # so much that prompts count


def null_text(network, iterations, n=10, scale=7.5):
    _, denoiser, rows = network(count=1, dtype=torch.float32, wrap=Swayed)
    grid, clean = SCHEDULE.grid(n), latents(1, dtype=torch.float32)

    def conditional(x, t):
        return denoiser(x, t, rows)

    def negative(x, t, embeds):
        return denoiser(x, t, Rows(embeds, embeds, rows.weights))

    path = path_of(inversion.invert(clean, grid, conditional), clean)
    spent = denoiser.evaluations
    options = (rows.negative_embeds, scale, iterations)
    found = list(inversion.null_text(path, grid, negative, conditional, *options))
    assert len(found) == n and denoiser.evaluations - spent <= n * (iterations + 2)
    return found, relative(found[-1][1], clean), denoiser, rows, grid, path


def test_null_text_leads_back_and_its_embeddings_alone_say_how(network):
    _, unoptimized, *_ = null_text(network, iterations=0)
    found, error, denoiser, rows, grid, path = null_text(network, iterations=10)
    assert error < 0.5 * unoptimized
    embeds = dict(zip(grid.timesteps, (each for each, _ in found), strict=True))

    def guided(x, t):
        return denoiser(x, t, Rows(rows.prompt_embeds, embeds[t], rows.weights), 7.5)

    again = last(inversion.sample(path[0], grid, guided))
    torch.testing.assert_close(again, found[-1][1], rtol=1e-4, atol=1e-4)
    assert not any(embeds[t].requires_grad for t in embeds)


def test_null_text_on_the_miniature_is_nearer_than_ddim_under_guidance():
    from inversion_pipeline import InversionPipeline

    pipe = InversionPipeline.from_pretrained("ckpt/miniature")
    pipe.set_progress_bar_config(disable=True)
    picture, prompt = "dataset/mountain/mountain.jpg", "a photo of rocky mountains at noon with a forest"
    clean = pipe.encode_image(picture)
    errors = {}
    for method in ("ddim", "null_text"):
        (found,) = pipe.invert(picture, prompt, 20, 3.0, method=method)
        errors[method] = relative(pipe.reconstruct(found), clean)
    assert errors["null_text"] < 0.7 * errors["ddim"], errors


# ---- v-prediction ----


class Velocity(Nearly):
    """Answers with the v of the same noise: (eps - sqrt(1 - a) x) / sqrt(a)."""

    factor = 1.0

    def __call__(self, x, t, **options):
        a = SCHEDULE.alpha_bar[t]
        (epsilon,) = super().__call__(x, t, **options)
        return ((epsilon - self.factor * (1 - a).sqrt().to(x) * x) / a.sqrt().to(x),)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_v_prediction_takes_the_path_of_the_epsilon_that_it_stands_for(network, scale, monkeypatch):
    velocity = NoiseSchedule(SCHEDULE.alpha_bar, "v_prediction")
    grid, clean = SCHEDULE.grid(20), latents(dtype=torch.float32)
    predict, _, _ = network(scale=scale, dtype=torch.float32)
    paths = {}
    for factor in (1.0, 0.9):
        monkeypatch.setattr(Velocity, "factor", factor)
        other, _, _ = network(scale=scale, dtype=torch.float32, schedule=velocity, wrap=Velocity)
        there = path_of(inversion.invert(clean, grid, other), clean)
        back = torch.stack(list(inversion.sample(there[0], grid, other)))
        paths[factor] = there, back
    there = path_of(inversion.invert(clean, grid, predict), clean)
    back = torch.stack(list(inversion.sample(there[0], grid, predict)))
    size = float(there.abs().max())
    for found, wanted in zip(paths[1.0], (there, back), strict=True):
        torch.testing.assert_close(found / size, wanted / size, rtol=0, atol=1e-5)
    assert (paths[0.9][0] - there).abs().max() / size > 1e-2
