"""Imagic's first stage on a tiny U-Net: it nears the picture; stopped anywhere, it gives the same bytes."""

from pathlib import Path

import pytest
import torch

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.editing.imagic import Embedding, fit_states
from lorakit.ground.chunks import Chunks

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())
STEPS = 6


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet(tiny_unet):
    return tiny_unet().requires_grad_(False)


@pytest.fixture
def fit(unet):
    """Factory that goes on with an embedding up to a number of steps; returns the losses."""

    def run(embedding, steps, seed=0, rows=4, learning_rate=1e-2):
        options = dict(steps=steps, learning_rate=learning_rate, seed=seed, chunks=Chunks(rows))
        return list(fit_states(unet, SCHEDULE, normal(1, 1, 4, 8, 8), embedding, **options))

    return run


def at_start():
    return Embedding.at_start(normal(0, 5, 16))


def test_the_states_near_the_picture_and_the_target_stays(fit):
    embedding = at_start()
    losses = fit(embedding, 30, learning_rate=0.1)
    again = at_start()
    again.states = embedding.states
    # The very samples of the first steps, under the states before and after.
    assert sum(fit(again, 5, learning_rate=1e-9)) < 0.99 * sum(fit(at_start(), 5, learning_rate=1e-9))
    assert torch.equal(embedding.target, at_start().target) and len(losses) == embedding.step == 30
    assert not torch.equal(embedding.states, embedding.target)


@pytest.mark.parametrize("at", range(1, STEPS))
def test_stopped_after_any_step_it_goes_on_to_the_same_bytes(fit, tmp_path, at):
    def written(embedding, name) -> bytes:
        embedding.write(tmp_path / name, {"x": "y"})
        return Path(tmp_path / name).read_bytes()

    straight, stopped, other = at_start(), at_start(), at_start()
    fit(straight, STEPS)
    fit(stopped, at)
    assert written(stopped, "a") != written(straight, "b")
    again = Embedding.read(tmp_path / "a", torch.device("cpu"))
    fit(again, STEPS)
    assert written(again, "a") == written(straight, "b")
    fit(other, STEPS, seed=1)
    assert written(other, "c") != written(straight, "b")


def test_rows_in_a_pass_change_nothing_but_rounding(fit):
    whole, single = at_start(), at_start()
    torch.testing.assert_close(fit(whole, 3), fit(single, 3, rows=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.states, single.states, rtol=1e-3, atol=1e-4)


def test_a_step_is_that_of_torch_s_adam():
    embedding, states = at_start(), at_start().states.clone().requires_grad_()
    optimizer = torch.optim.Adam([states], lr=1e-2)
    for number in range(4):
        gradient = normal(10 + number, 5, 16)
        states.grad = gradient
        optimizer.step()
        embedding.move(gradient, 1e-2)
    torch.testing.assert_close(embedding.states, states.detach(), rtol=1e-6, atol=1e-7)


def test_the_ends_of_the_mix_are_picture_and_target(fit):
    embedding = at_start()
    fit(embedding, 2)
    assert torch.equal(embedding.between(0)[0], embedding.states)
    assert torch.equal(embedding.between(1)[0], embedding.target)
    middle = (embedding.states + embedding.target) / 2
    torch.testing.assert_close(embedding.between(0.5)[0], middle)
