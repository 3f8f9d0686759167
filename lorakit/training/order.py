"""Which picture each sample of a run shows, and how a step is split into passes. No torch at import.

Sample `slot` of step `step` is number step x total_batch + slot of the run; all that is drawn for it follows
from that. Where every bucket holds a step, each step shows one bucket. Where one is smaller, or folders are
repeated, steps are cut from a chain of epochs and may show several.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from lorakit.ground import randomness

ABSENT = -1
"""In place of a row: this sample of the last step is left out, as the epochs end before."""


class SampleOrder:
    """The row that each sample of a step shows, by step; a pure function of what it is made with.

    A longer run begins like a shorter one. At the end of whole epochs each row has been shown as often as its
    repeats say, give or take one (docs/LOG.md). Of each chain of epochs one is kept: with the rows of buckets
    16 bytes for each showing in an epoch, however long the run.

    Args:
        buckets: of each row; rows of one bucket can share a pass.
        showings: samples of the run; what the last step has beyond them is ABSENT.
    """

    def __init__(
        self,
        seed: int,
        buckets: Sequence,
        repeats: Sequence[int],
        total_batch: int,
        steps: int,
        showings: int,
    ):
        self.total_batch, self.steps, self.showings = total_batch, steps, showings
        if holds_steps(buckets, repeats, total_batch):
            self._rows = bucket_steps(seed, buckets, total_batch)
        else:
            self._rows = epoch_steps(seed, buckets, repeats, total_batch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> np.ndarray:
        """(total_batch,) int64"""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        rows = self._rows(step)
        rows[max(0, self.showings - step * self.total_batch) :] = ABSENT
        return rows


def holds_steps(buckets: Sequence, repeats: Sequence[int], total_batch: int) -> bool:
    """Whether every bucket fills a step, and all rows are shown alike."""
    return len(set(repeats)) == 1 and min(Counter(buckets).values()) >= total_batch


def count_showings(
    seed: int, buckets: Sequence, repeats: Sequence[int], total_batch: int, steps: int, showings: int
) -> np.ndarray:
    """How often a run shows each row of its SampleOrder, without torch.

    Where every bucket holds a step and an epoch of one is cut short, the right number of its rows are counted
    once more, but not the right ones.
    """
    groups = _groups(buckets)
    if not holds_steps(buckets, repeats, total_batch):
        epochs = _Epochs(seed, groups, repeats, total_batch)
        whole, rest = divmod(min(steps * total_batch, showings), epochs.size)
        last = np.bincount(epochs.rows(whole)[:rest], minlength=len(buckets))
        return whole * np.array(repeats) // math.gcd(*repeats) + last
    counts = np.zeros(len(buckets), dtype=np.int64)
    for group, own in zip(groups, _turns_taken(tuple(map(len, groups)), steps), strict=True):
        whole, rest = divmod(own * total_batch, len(group))
        counts[group] = whole + (np.arange(len(group)) < rest)
    return counts


def _groups(buckets: Sequence) -> list[np.ndarray]:
    """The rows of each bucket, in the order of the buckets."""
    sizes = Counter(buckets)
    number = {bucket: place for place, bucket in enumerate(sorted(sizes))}
    of_row = np.fromiter((number[bucket] for bucket in buckets), np.int64, len(buckets))
    ends = np.cumsum([sizes[bucket] for bucket in number])
    return np.split(np.argsort(of_row, kind="stable"), ends[:-1])


class _Chain:
    """An endless chain of epochs of one size, of which the last that was asked for is kept.

    Args:
        rows: of an epoch, by its number.
    """

    def __init__(self, size: int, rows: Callable[[int], np.ndarray]):
        self.size, self.rows = size, rows
        self.number, self.epoch = -1, np.empty(0, dtype=np.int64)

    def cut(self, start: int, count: int) -> np.ndarray:
        """`count` rows from sample `start` of the chain on."""
        found = []
        while count:
            number, first = divmod(start, self.size)
            if number != self.number:
                self.number, self.epoch = number, self.rows(number)
            found.append(self.epoch[first : first + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)


# ---- steps of one bucket ----


def bucket_steps(seed: int, buckets: Sequence, total_batch: int) -> Callable[[int], np.ndarray]:
    """The rows of any step; each shows one bucket, and is full whatever the size of that.

    Every bucket is an endless chain of shuffled epochs; the one that lags most behind its share goes next.
    """

    def shuffled(number: int, epoch: int) -> np.ndarray:
        import torch

        drawn = randomness.generator(seed, "order", number, epoch)
        return groups[number][torch.randperm(len(groups[number]), generator=drawn).numpy()]

    groups = _groups(buckets)
    chains = [_Chain(len(group), partial(shuffled, number)) for number, group in enumerate(groups)]
    turns = _Turns([len(group) for group in groups])

    def rows(step: int) -> np.ndarray:
        turn = turns.at(step)
        return chains[turn].cut(int(turns.taken[turn]) * total_batch, total_batch)

    return rows


class _Turns:
    """Which bucket each step shows: the one that lags most behind its share of the steps before.

    `taken` are the steps that each bucket had before number `step`.
    """

    def __init__(self, sizes: Sequence[int]):
        self.share, self.step, self.taken = np.array(sizes) / sum(sizes), 0, np.zeros(len(sizes))

    def taken_before(self, step: int) -> np.ndarray:
        """Go to a step; going back begins at the first one."""
        if step < self.step:
            self.step, self.taken = 0, np.zeros(len(self.share))
        if len(self.share) == 1:
            self.step, self.taken[0] = step, step
        share, taken = self.share, self.taken
        for done in range(self.step, step):
            taken[(share * (done + 1) - taken).argmax()] += 1
        self.step = step
        return taken

    def at(self, step: int) -> int:
        taken = self.taken_before(step)
        return int((self.share * (step + 1) - taken).argmax())


@lru_cache(8)
def _turns_taken(sizes: tuple[int, ...], steps: int) -> list[int]:
    """The steps of each bucket in a run; a plan asks several times, and a million steps take seconds."""
    return _Turns(sizes).taken_before(steps).astype(int).tolist()


# ---- steps cut from epochs ----


def epoch_steps(
    seed: int, buckets: Sequence, repeats: Sequence[int], total_batch: int
) -> Callable[[int], np.ndarray]:
    """The rows of any step; steps are cut from a chain of epochs, which show each row as its repeats say."""
    epochs = _Epochs(seed, _groups(buckets), repeats, total_batch)
    chain = _Chain(epochs.size, epochs.rows)
    return lambda step: chain.cut(step * total_batch, total_batch)


class _Epochs:
    """Epochs by number, in each of which the rows of a bucket stand together as far as whole steps go."""

    def __init__(self, seed: int, groups: Sequence[np.ndarray], repeats: Sequence[int], total_batch: int):
        self.seed, self.total_batch = seed, total_batch
        times = np.array(repeats) // math.gcd(*repeats)
        self.groups = [np.repeat(group, times[group]) for group in groups]
        self.size = sum(map(len, self.groups))

    def rows(self, epoch: int) -> np.ndarray:
        whole, rest = [], []
        for number, group in enumerate(self.groups):
            rows = self._shuffled(group, "rows", number, epoch)
            cut = len(rows) // self.total_batch * self.total_batch
            whole.append(rows[:cut].reshape(-1, self.total_batch))
            rest.append(rows[cut:])
        steps, rest = self._shuffled(np.concatenate(whole), "steps", epoch), np.concatenate(rest)
        begun = epoch * self.size % self.total_batch  # samples of the step that the last epoch left unfilled
        head = (self.total_batch - begun) % self.total_batch
        if head > len(rest) and len(steps):
            steps, rest = steps[:-1], np.concatenate([rest, steps[-1]])
        return np.concatenate([rest[:head], steps.ravel(), rest[head:]])

    def _shuffled(self, items: np.ndarray, stream: str, *index: int) -> np.ndarray:
        draw = np.random.default_rng(randomness.derive_seed(self.seed, f"order, {stream}", *index))
        return items[np.argsort(draw.random(len(items)), kind="stable")]


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
