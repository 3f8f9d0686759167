"""Randomness as a pure function of (seed, stream, step, sample): nothing to save, nothing that can drift.

Every random number of a run comes from a generator seeded by a hash of what it is for. A result therefore
depends neither on the batch size, nor on the number of processes, nor on having been interrupted.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seeds, numbers and integers are drawn without torch
    import torch
    from torch import Tensor


def derive_seed(seed: int, stream: str, *index: int | str) -> int:
    """A 63-bit seed from the run's seed, the name of a stream, and integers or names that number the draw."""
    text = "/".join([str(seed), stream, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: str, *index: int | str) -> torch.Generator:
    """A CPU generator for one draw; on the CPU on every device, so that results carry over."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


def normal(shape: tuple[int, ...], seed: int, stream: str, *index: int | str) -> Tensor:
    """Standard normal noise of `shape`, float32 on the CPU."""
    import torch

    return torch.randn(shape, generator=generator(seed, stream, *index))


def uniform(seed: int, stream: str, *index: int | str) -> float:
    """One number in [0, 1), without the cost of a torch generator."""
    return derive_seed(seed, stream, *index) / 2**63


def integer(high: int, seed: int, stream: str, *index: int | str) -> int:
    """One integer in [0, high)."""
    return derive_seed(seed, stream, *index) % high
