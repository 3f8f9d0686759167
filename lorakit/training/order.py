"""Which picture each sample of a run shows, and how a step is split into passes. No torch at import.

Sample `slot` of step `step` is number step x total_batch + slot of the run; all that is drawn for it follows
from that. Where every bucket holds a step, each step shows one bucket. Where one is smaller, or folders are
repeated, steps are cut from a chain of epochs and may show several.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from lorakit.ground import randomness

ABSENT = -1
"""In place of a row: this sample of the last step is left out, as the epochs end before."""


def holds_steps(buckets: Sequence, repeats: Sequence[int], total_batch: int) -> bool:
    """Whether every bucket fills a step, and all rows are shown alike."""
    return len(set(repeats)) == 1 and all(len(group) >= total_batch for group in _groups(buckets))


def sample_order(
    seed: int, buckets: Sequence, repeats: Sequence[int], total_batch: int, steps: int, showings: int
) -> np.ndarray:
    """The row that each sample of each step shows, (steps, total_batch) int64; a pure function.

    A longer run begins like a shorter one. At the end of whole epochs each row has been shown as often as its
    repeats say, give or take one (docs/LOG.md).

    Args:
        buckets: of each row; rows of one bucket can share a pass.
        showings: samples of the run; what the last step has beyond them is ABSENT.
    """
    if holds_steps(buckets, repeats, total_batch):
        order = bucket_order(seed, buckets, total_batch, steps)
    else:
        order = epoch_order(seed, buckets, repeats, total_batch, steps)
    order.reshape(-1)[showings:] = ABSENT
    return order


def count_showings(
    seed: int, buckets: Sequence, repeats: Sequence[int], total_batch: int, steps: int, showings: int
) -> np.ndarray:
    """How often a run shows each row of its sample_order, without torch.

    Where every bucket holds a step and an epoch of one is cut short, the right number of its rows are counted
    once more, but not the right ones.
    """
    if not holds_steps(buckets, repeats, total_batch):
        order = sample_order(seed, buckets, repeats, total_batch, steps, showings)
        return np.bincount(order[order >= 0], minlength=len(buckets))
    counts = np.zeros(len(buckets), dtype=np.int64)
    groups = _groups(buckets)
    turns = np.bincount(list(_turns(groups, steps)), minlength=len(groups))
    for group, own in zip(groups, turns, strict=True):
        whole, rest = divmod(int(own) * total_batch, len(group))
        counts[group] = whole + (np.arange(len(group)) < rest)
    return counts


# ---- steps of one bucket ----


def bucket_order(seed: int, buckets: Sequence, total_batch: int, steps: int) -> np.ndarray:
    """Steps of one bucket each, full whatever its size.

    Every bucket is an endless chain of shuffled epochs; the one that lags most behind its share goes next.
    """
    groups = _groups(buckets)
    chains = [_shuffled_epochs(seed, number, group) for number, group in enumerate(groups)]
    order = np.empty((steps, total_batch), dtype=np.int64)
    for step, turn in enumerate(_turns(groups, steps)):
        order[step] = list(islice(chains[turn], total_batch))
    return order


def _groups(buckets: Sequence) -> list[np.ndarray]:
    """The rows of each bucket, in the order of the buckets."""
    rows: dict = {}
    for row, bucket in enumerate(buckets):
        rows.setdefault(bucket, []).append(row)
    return [np.array(rows[bucket]) for bucket in sorted(rows)]


def _turns(groups: Sequence[np.ndarray], steps: int) -> Iterator[int]:
    sizes = np.array([len(group) for group in groups])
    share, taken = sizes / sizes.sum(), np.zeros(len(groups))
    for step in range(steps):
        turn = int(np.argmax(share * (step + 1) - taken))
        taken[turn] += 1
        yield turn


def _shuffled_epochs(seed: int, number: int, rows: np.ndarray) -> Iterator[int]:
    import torch

    for epoch in count():
        shuffle = torch.randperm(len(rows), generator=randomness.generator(seed, "order", number, epoch))
        yield from rows[shuffle.numpy()]


# ---- steps cut from epochs ----


def epoch_order(
    seed: int, buckets: Sequence, repeats: Sequence[int], total_batch: int, steps: int
) -> np.ndarray:
    """Steps cut from a chain of epochs, each of which shows every row as often as its repeats say.

    Within an epoch the rows of a bucket stand together as far as whole steps can be had of them.
    """
    common = math.gcd(*repeats)
    groups = [np.repeat(group, [repeats[row] // common for row in group]) for group in _groups(buckets)]
    chain = _epochs(seed, groups, total_batch)
    rows = np.fromiter(islice(chain, steps * total_batch), dtype=np.int64, count=steps * total_batch)
    return rows.reshape(steps, total_batch)


def _epochs(seed: int, groups: Sequence[np.ndarray], total_batch: int) -> Iterator[int]:
    size = sum(map(len, groups))
    for epoch in count():
        whole, rest = [], []
        for number, group in enumerate(groups):
            rows = _shuffled(list(group), seed, "rows", number, epoch)
            cut = len(rows) // total_batch * total_batch
            whole += [rows[start : start + total_batch] for start in range(0, cut, total_batch)]
            rest += rows[cut:]
        whole = _shuffled(whole, seed, "steps", epoch)
        begun = epoch * size % total_batch  # samples of the step that the last epoch has left unfilled
        head = (total_batch - begun) % total_batch
        if head > len(rest) and whole:
            rest += whole.pop()
        yield from rest[:head]
        for rows in whole:
            yield from rows
        yield from rest[head:]


def _shuffled(items: Sequence, seed: int, stream: str, *index: int) -> list:
    draws = np.random.default_rng(randomness.derive_seed(seed, f"order, {stream}", *index)).random(len(items))
    return [items[i] for i in np.argsort(draws, kind="stable")]


# ---- passes ----


@dataclass(frozen=True)
class Share:
    """A micro-batch: samples of a step that one process shows in one pass, all of one bucket.

    The sum of (mean loss / divisor) over a process, averaged over processes, is the mean over the step. An
    infinite divisor marks a pass of a process that has no sample, so that gradients can be exchanged.
    """

    slots: tuple[int, ...]
    rows: tuple[int, ...]
    divisor: float

    def positions(self, step: int, total_batch: int) -> list[int]:
        return [step * total_batch + slot for slot in self.slots]


def split_step(
    rows: np.ndarray, buckets: Sequence, batch_size: int, processes: int = 1, index: int = 0
) -> list[Share]:
    """What process `index` shows of a step: passes of `batch_size` samples, or fewer, all of one bucket."""
    present = [slot for slot, row in enumerate(rows) if row != ABSENT]
    shares = []
    for start in range(index * batch_size, len(rows), batch_size * processes):
        by_bucket: dict[object, list[int]] = {}
        for slot in range(start, start + batch_size):
            if rows[slot] != ABSENT:
                by_bucket.setdefault(buckets[rows[slot]], []).append(slot)
        for slots in by_bucket.values():
            divisor = len(present) / (len(slots) * processes)
            shares.append(Share(tuple(slots), tuple(int(rows[slot]) for slot in slots), divisor))
    slot = present[0] if present else 0
    return shares or [Share((slot,), (max(0, int(rows[slot])),), math.inf)]
