"""Which picture each sample shows: each as often as was promised, whatever aspects, batch and processes."""

import json
import math
import random
import tracemalloc
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import settings_of

from lorakit.ground import randomness
from lorakit.ground.config import load_config
from lorakit.training.config import TrainConfig
from lorakit.training.forecast import describe_plan
from lorakit.training.order import (
    ABSENT,
    SampleOrder,
    bucket_steps,
    count_showings,
    epoch_steps,
    holds_steps,
    split_step,
)
from lorakit.training.plan import make_plan


def sample_order(seed, *args, **run) -> np.ndarray:
    """All steps of a run, (steps, total_batch)."""
    return np.array([*SampleOrder(seed, *args, **run)])


def bucket_order(seed, buckets, total_batch, steps) -> np.ndarray:
    return np.array([*map(bucket_steps(seed, buckets, total_batch), range(steps))])


def epoch_order(seed, buckets, repeats, total_batch, steps) -> np.ndarray:
    return np.array([*map(epoch_steps(seed, buckets, repeats, total_batch), range(steps))])


# ---- steps of one bucket ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("total_batch", [1, 2, 3, 5])
def test_one_bucket_shows_every_picture_equally_often(seed, total_batch):
    order = bucket_order(seed, ["a"] * 7, total_batch, steps=7 * 4)
    assert order.shape == (28, total_batch)
    assert (np.bincount(order.ravel(), minlength=7) == 4 * total_batch).all()
    for epoch in order.ravel()[: 7 * (order.size // 7)].reshape(-1, 7):
        assert sorted(epoch) == list(range(7))


def test_epochs_are_shuffled_differently_and_by_seed():
    order = bucket_order(0, ["a"] * 50, 1, 100).ravel()
    assert list(order[:50]) != list(order[50:])
    assert list(order) != list(bucket_order(1, ["a"] * 50, 1, 100).ravel())


def test_a_step_shows_one_bucket_and_buckets_get_their_share():
    buckets = ["wide"] * 6 + ["tall"] * 3 + ["square"]
    order = bucket_order(0, buckets, 4, steps=100)
    for step in order:
        assert len({buckets[row] for row in step}) == 1
    counts = np.bincount(order.ravel(), minlength=10) / 40
    assert np.abs(counts - 1).max() < 0.15  # each picture within 15 % of its epochs


def test_fewer_pictures_than_the_batch_still_fill_it():
    assert bucket_order(0, ["a"], 4, 3).tolist() == [[0] * 4] * 3


def test_a_longer_run_begins_like_a_shorter_one():
    buckets = ["a", "a", "b"]
    np.testing.assert_array_equal(bucket_order(3, buckets, 2, 40)[:10], bucket_order(3, buckets, 2, 10))


# ---- steps cut from epochs ----


@pytest.mark.parametrize("total_batch", [1, 2, 3, 5, 8])
def test_after_every_step_no_row_is_more_than_one_showing_ahead(total_batch):
    buckets = ["wide"] * 6 + ["tall"] * 3 + ["square"]
    order = epoch_order(0, buckets, [1] * 10, total_batch, steps=60)
    for step in range(1, 61):
        counts = np.bincount(order[:step].ravel(), minlength=10)
        assert counts.max() - counts.min() <= 1


def test_rows_are_repeated_as_they_ask_and_at_other_places_in_each_epoch():
    order = epoch_order(0, ["a"] * 3 + ["b"], [20, 1, 4, 2], 5, steps=27).reshape(5, 27)
    for epoch in order:
        assert np.bincount(epoch).tolist() == [20, 1, 4, 2]
    assert order[0].tolist() != order[1].tolist()
    plain = epoch_order(0, ["a"] * 3, [2, 2, 2], 3, steps=4)  # alike: as often as any other all the time
    assert [sorted(step) for step in plain] == [[0, 1, 2]] * 4


def test_steps_mix_buckets_no_more_than_they_must():
    buckets = ["a"] * 9 + ["b"] * 9 + ["c"] * 2
    order = epoch_order(0, buckets, [1] * 20, 4, steps=50)
    kinds = [len({buckets[row] for row in step}) for step in order]
    assert kinds.count(1) >= 30  # of an epoch's five steps one must mix, and four more rows are left over
    shuffled = np.random.default_rng(0).permutation(20)
    assert sum(len({buckets[row] for row in shuffled[i : i + 4]}) == 1 for i in range(0, 20, 4)) < 3


def test_a_longer_run_of_epochs_begins_like_a_shorter_one():
    buckets, repeats = ["a", "a", "b"], [1, 3, 2]
    long, short = (epoch_order(3, buckets, repeats, 2, steps) for steps in (40, 10))
    np.testing.assert_array_equal(long[:10], short)
    assert not np.array_equal(short, epoch_order(4, buckets, repeats, 2, 10))


# ---- which of the two, and where it ends ----


def test_buckets_that_hold_a_step_are_shown_as_they_always_were():
    buckets = ["a"] * 12 + ["b"] * 5
    order = sample_order(1, buckets, [1] * 17, 4, 30, 120)
    np.testing.assert_array_equal(order, bucket_order(1, buckets, 4, 30))
    assert holds_steps(buckets, [1] * 17, 4) and not holds_steps(buckets, [1] * 17, 6)
    assert not holds_steps(buckets, [1] * 16 + [2], 4) and holds_steps(buckets, [2] * 17, 4)
    assert not np.array_equal(sample_order(1, buckets, [1] * 17, 6, 30, 180), bucket_order(1, buckets, 6, 30))


def test_the_last_step_ends_with_the_epochs():
    order = sample_order(0, ["a"] * 3, [1] * 3, 8, 2, 12)
    assert (order[1, 4:] == ABSENT).all() and np.bincount(order[order >= 0]).tolist() == [4, 4, 4]


def random_set(rng: random.Random) -> dict:
    """Sizes, batch, accumulation, processes and repeats of a data set with a run of n_epochs."""
    total = rng.choice([1, 2, 3, 4, 8]) * rng.choice([1, 1, 2, 3]) * rng.choice([1, 1, 2, 4])
    form = rng.choice(["few of many", "full", "one"])
    count = {"few of many": rng.randint(2, 40), "full": rng.randint(2, 20), "one": 1}[form]
    least = total if form == "full" else 1
    buckets = [
        number for number in range(count) for _ in range(rng.randint(least, least + rng.choice([2, 60])))
    ]
    repeats = [1] * len(buckets) if rng.random() < 0.7 else [rng.choice([1, 1, 2, 7, 20]) for _ in buckets]
    return {"buckets": buckets, "repeats": repeats, "total_batch": total, "epochs": rng.randint(1, 12)}


@pytest.mark.parametrize("seed", range(200))
def test_of_random_data_sets_every_picture_is_shown_within_one_of_the_promise(seed):
    data = random_set(random.Random(seed))
    epochs, total, repeats = data.pop("epochs"), data["total_batch"], data["repeats"]
    samples = epochs * sum(repeats)
    steps = math.ceil(samples / total)
    full = holds_steps(data["buckets"], repeats, total)
    run = data | {"steps": steps, "showings": steps * total if full else samples}
    order = sample_order(seed, **run)
    counts = np.bincount(order[order >= 0], minlength=len(repeats))
    assert np.abs(counts - epochs * np.array(repeats)).max() <= 1
    told = count_showings(seed, **run)
    assert sorted(told) == sorted(counts) and (told.min(), told.max()) == (counts.min(), counts.max())


def test_steps_of_one_bucket_would_break_that_promise():
    """The negative control: the twelve aspects of which four were never shown."""
    order = bucket_order(0, range(12), 8, 6)
    assert np.bincount(order.ravel(), minlength=12).tolist().count(0) >= 4


# ---- piece by piece ----


def whole_order(seed, buckets, repeats, total_batch, steps, showings) -> np.ndarray:
    """The order as it was made at once, in lists of the whole run, when files of these bytes were trained."""
    groups = [[row for row, each in enumerate(buckets) if each == bucket] for bucket in sorted(set(buckets))]
    if len(set(repeats)) == 1 and min(map(len, groups)) >= total_batch:
        order = [*islice(whole_buckets(seed, groups, total_batch), steps * total_batch)]
    else:
        times = [each // math.gcd(*repeats) for each in repeats]
        groups = [[row for row in group for _ in range(times[row])] for group in groups]
        order = [*islice(whole_epochs(seed, groups, total_batch), steps * total_batch)]
    return np.array(order[:showings] + [ABSENT] * (len(order) - showings)).reshape(steps, total_batch)


def whole_buckets(seed, groups, total_batch):
    def epochs(number, group):
        for epoch in count():
            drawn = randomness.generator(seed, "order", number, epoch)
            yield from (group[place] for place in torch.randperm(len(group), generator=drawn))

    chains = [epochs(number, group) for number, group in enumerate(groups)]
    sizes = np.array([len(group) for group in groups])
    share, taken = sizes / sizes.sum(), np.zeros(len(groups))
    for step in count():
        turn = int(np.argmax(share * (step + 1) - taken))
        taken[turn] += 1
        yield from islice(chains[turn], total_batch)


def whole_epochs(seed, groups, total_batch):
    def shuffled(items, stream, *index):
        draw = np.random.default_rng(randomness.derive_seed(seed, f"order, {stream}", *index))
        return [items[i] for i in np.argsort(draw.random(len(items)), kind="stable")]

    size = sum(map(len, groups))
    for epoch in count():
        whole, rest = [], []
        for number, group in enumerate(groups):
            rows = shuffled(group, "rows", number, epoch)
            cut = len(rows) // total_batch * total_batch
            whole += [rows[start : start + total_batch] for start in range(0, cut, total_batch)]
            rest += rows[cut:]
        whole = shuffled(whole, "steps", epoch)
        head = -epoch * size % total_batch
        if head > len(rest) and whole:
            rest += whole.pop()
        yield from rest[:head]
        for rows in whole:
            yield from rows
        yield from rest[head:]


@pytest.mark.parametrize("seed", range(200))
def test_of_random_data_sets_the_pieces_are_those_of_the_whole_order(seed):
    rng = random.Random(seed)
    data = random_set(rng)
    samples = data.pop("epochs") * sum(data["repeats"])
    steps = math.ceil(samples / data["total_batch"])
    run = data | {"steps": steps, "showings": samples}
    order, whole = SampleOrder(seed, **run), whole_order(seed, **run)
    np.testing.assert_array_equal(np.array([*order]), whole)
    assert len(order) == steps
    for step in rng.choices(range(steps), k=8):  # as a resumed run, or one that looks back, asks for them
        np.testing.assert_array_equal(order[step], whole[step])
        np.testing.assert_array_equal(SampleOrder(seed, **run)[step], whole[step])
    if len(data["buckets"]) > 8:  # so few have few orders
        assert not np.array_equal(np.array([*order]), whole_order(seed + 1, **run))


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_that_the_run_has_not_is_refused(step):
    with pytest.raises(IndexError, match=f"step {step} of 5"):
        SampleOrder(0, ["a"], [1], 1, 5, 5)[step]


def peak_of(walk) -> int:
    """Bytes that a call holds at most, beyond what was there."""
    tracemalloc.start()
    walk()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("repeats", [[1] * 200, [1] * 199 + [2]])
def test_an_order_holds_no_more_however_long_the_run(repeats):
    buckets = ["a", "b"] * 100

    def walk(steps):
        order = SampleOrder(0, buckets, repeats, 4, steps, 4 * steps)
        return lambda: sum(len(order[step]) for step in range(steps))

    def whole(steps):
        return lambda: whole_order(0, buckets, repeats, 4, steps, 4 * steps)

    walk(200)()  # what is imported and cached once
    assert peak_of(walk(2000)) - peak_of(walk(100)) < 4_000
    assert peak_of(whole(2000)) - peak_of(whole(100)) > 60_000


# ---- passes ----


def test_a_step_of_one_bucket_is_split_evenly():
    for processes, batch, parts in [(1, 4, 3), (2, 2, 3), (3, 4, 1), (2, 6, 1)]:
        shares = [split_step(np.arange(12), "a" * 12, batch, processes, i) for i in range(processes)]
        assert [len(own) for own in shares] == [parts] * processes
        assert {share.divisor for own in shares for share in own} == {parts}
        seen = sorted(slot for own in shares for share in own for slot in share.slots)
        assert seen == list(range(12))
    assert split_step(np.arange(12), "a" * 12, 2, 2, 1)[1].slots == (6, 7)
    assert split_step(np.arange(12), "a" * 12, 2, 2, 1)[1].positions(3, 12) == [42, 43]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_mean_over_passes_and_processes_is_the_mean_over_the_samples(processes):
    rng = np.random.default_rng(0)
    rows, losses = np.array([0, 1, 2, 0, 1, 2, 2, 2, 1, ABSENT, ABSENT, ABSENT]), rng.random(12)
    shares = [split_step(rows, ["x", "y", "x"], 12 // processes // 2, processes, i) for i in range(processes)]
    for own in shares:
        assert all(len({["x", "y", "x"][row] for row in share.rows}) == 1 for share in own)
    means = [sum(losses[list(share.slots)].mean() / share.divisor for share in own) for own in shares]
    assert np.mean(means) == pytest.approx(losses[rows >= 0].mean())


def test_a_process_without_samples_takes_part_and_adds_nothing():
    (share,) = split_step(np.array([5, ABSENT]), "aaaaaa", 1, 2, 1)
    assert share.rows == (5,) and share.divisor == math.inf


# ---- a plan ----


def folder_of(root: Path, sizes: list[tuple[int, int]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"a photo of ridge {number}")
    return root


def plan_of(data: Path, processes: int = 1, **changes):
    words = settings_of(data_dir=str(data), max_train_steps=None, aspect_ratio_buckets=None, **changes)
    cfg = load_config(TrainConfig, "cfg/mountain.json", words).config
    return cfg, make_plan(cfg, processes)


TWELVE = [(41, 100), (45, 91), (48, 85), (52, 79), (57, 72), (62, 66)]
TWELVE += [(height, width) for width, height in TWELVE]


@pytest.mark.parametrize("processes", [1, 2])
def test_twelve_aspects_in_batches_of_eight_are_each_shown_four_times(tmp_path, processes):
    data = folder_of(tmp_path / "data", TWELVE)
    cfg, plan = plan_of(data, processes, train_batch_size=8 // processes, n_epochs=4, resolution=256)
    assert len(set(plan.shapes)) >= 8 and plan.steps == 6
    assert np.bincount(sample_order(0, **plan.order).ravel()).tolist() == [4] * 12
    assert "each picture 4 times" in describe_plan(cfg, plan)
    assert "4 epochs" in describe_plan(cfg, plan)


def test_real_showings_are_said_where_steps_end_the_run(tmp_path):
    data = folder_of(tmp_path / "data", TWELVE)
    cfg, plan = plan_of(data, train_batch_size=2, n_epochs=4, resolution=256)
    cfg = cfg.model_copy(update={"max_train_steps": 4})
    text = describe_plan(cfg, make_plan(cfg))
    assert "each picture 0 to 1 times" in text and "4 of 12 pictures are never shown" in text
    assert "max_train_steps 4 ends the run before n_epochs 4" in text


def test_a_folder_of_kohya_is_shown_as_often_as_its_number_says(tmp_path):
    folder_of(tmp_path / "20_zwx ridge", [(64, 64)] * 2)
    folder_of(tmp_path / "1_ridge", [(64, 64)] * 4)
    cfg, plan = plan_of(tmp_path, repeats="kohya", n_epochs=2, train_batch_size=4)
    order = sample_order(0, **plan.order)
    counts = dict(zip([row.name for row in plan.table.rows], np.bincount(order[order >= 0]), strict=True))
    assert counts["20_zwx ridge/00.png"] == 40 and counts["1_ridge/03.png"] == 2
    assert "4 picture(s) with 1 repeats 2 times, 2 picture(s) with 20 repeats 40 times" in describe_plan(
        cfg, plan
    )
    same = plan_of(tmp_path, repeats={"20_zwx ridge": 20}, n_epochs=2, train_batch_size=4)[1]
    np.testing.assert_array_equal(sample_order(0, **same.order), order)
    cfg, plain = plan_of(tmp_path, n_epochs=2)
    assert set(plain.repeats) == {1} and plain.table.fingerprint != plan.table.fingerprint
    assert 'set repeats to "kohya"' in describe_plan(cfg, plain)
    assert json.dumps(plan.repeats) == "[1, 1, 1, 1, 20, 20]"


# ---- shapes ----


def test_a_panorama_has_a_bucket_and_what_is_cropped_is_named_with_its_share(tmp_path):
    cfg, plan = plan_of(folder_of(tmp_path / "data", [(256, 64), (64, 64)]), n_epochs=1)
    assert plan.shapes[0] == (256, 64) and not any("cropping" in note for note in plan.notes)
    cfg, plan = plan_of(tmp_path / "data", n_epochs=1, resolution=96)
    (note,) = [note for note in plan.notes if "cropping" in note]
    kept = plan.shapes[0][0] / plan.shapes[0][1] / 4
    assert f"1 picture(s) lose more than 10% to cropping at each showing: 00.png {1 - kept:.0%}" in note


def test_one_picture_alone_keeps_its_aspect_and_a_square_its_resolution(tmp_path):
    alone = folder_of(tmp_path / "wide", [(96, 64)])
    assert plan_of(alone, n_epochs=1)[1].shapes == ((160, 96),)
    square = folder_of(tmp_path / "square", [(64, 64)])
    assert plan_of(square, n_epochs=1, resolution=104)[1].shapes == ((104, 104),)
    words = settings_of(data_dir=str(alone), aspect_ratio_buckets=False)
    assert make_plan(load_config(TrainConfig, "cfg/mountain.json", words).config).shapes == ((128, 128),)
