"""Random numbers are a pure function of what they are for."""

import subprocess
import sys

import torch

from lorakit.ground import randomness


def test_same_names_give_same_numbers_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b = (randomness.normal((4, 8, 8), 7, "noise", 3) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_each_part_of_the_name_matters():
    seeds = {
        randomness.derive_seed(*name)
        for name in [
            (7, "noise", 3),
            (8, "noise", 3),
            (7, "flip", 3),
            (7, "noise", 4),
            (7, "noise", 3, 0),
            (73, "noise"),
        ]
    }
    assert len(seeds) == 6


def test_numbers_are_the_same_in_another_process():
    code = "from lorakit.ground.randomness import derive_seed; print(derive_seed(7, 'noise', 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == randomness.derive_seed(7, "noise", 3)


def test_uniform_and_integers_fill_their_range_evenly():
    draws = torch.tensor([randomness.uniform(0, "u", i) for i in range(4000)])
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.std() - 12**-0.5) < 0.01
    counts = torch.bincount(
        torch.tensor([randomness.integer(10, 0, "i", i) for i in range(4000)]), minlength=10
    )
    assert len(counts) == 10 and counts.min() > 320 and counts.max() < 480


def test_noise_of_neighbouring_samples_is_independent():
    noise = torch.stack([randomness.normal((4, 32, 32), 0, "noise", i).flatten() for i in range(8)])
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.08
