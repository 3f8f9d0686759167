"""Even speed on simulated paths: from a position to what is seen there, steep in the middle as morphs are."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorakit.film.pacing import EASINGS, ease, even_positions, next_probe, select_even, share_frames

FRAMES = 17
lengths_ = st.lists(st.one_of(st.just(0.0), st.floats(0, 1e308)), min_size=1, max_size=20)


def sigmoid(steepness, centre=0.5):
    return lambda u: 1 / (1 + np.exp(-steepness * (np.asarray(u) - centre)))


def curved(steepness, centre=0.5):
    """The same in four dimensions and on a bend: chords, which are what is measured, cut its corners."""
    s = sigmoid(steepness, centre)
    return lambda u: np.stack([s(u), 0.6 * np.sin(2 * s(u)), 0.4 * np.cos(3 * s(u)), 0.3 * np.asarray(u)], -1)


PATHS = [sigmoid(10), sigmoid(12), sigmoid(16), sigmoid(20, 0.3), curved(16)]


def steps(path, positions):
    features = np.asarray(path(positions)).reshape(len(positions), -1)
    return np.linalg.norm(np.diff(features, axis=0), axis=1)


def unevenness(path, positions):
    distances = steps(path, positions)
    return distances.max() / distances.min()


def probe(path, count=9):
    """Positions looked at: five evenly, then two by two where it pays."""
    known = np.linspace(0, 1, 5).tolist()
    while len(known) < count:
        known = sorted(known + next_probe(known, steps(path, known), 2))
    return known


def straight(known, distances, count):
    """DiffMorpher's eqs. 11-12: the inverse of a piecewise linear length."""
    path = np.concatenate([[0.0], np.cumsum(distances)])
    return np.interp(np.linspace(0, path[-1], count), path, known).tolist()


def assert_sound(positions, known, count):
    assert len(positions) == count and (positions[0], positions[-1]) == (known[0], known[-1])
    assert np.isfinite(positions).all() and (np.diff(positions) > 0).all()


# Even speed


@pytest.mark.parametrize("path", PATHS)
def test_nine_probes_make_seventeen_frames_even_and_a_second_pass_more_so(path):
    assert unevenness(path, np.linspace(0, 1, FRAMES)) > 20  # what there is to be cured
    known = probe(path)
    assert len(known) == 9
    first = even_positions(known, steps(path, known), FRAMES)
    assert unevenness(path, first) <= 1.4
    second = even_positions(first, steps(path, first), FRAMES)
    assert unevenness(path, second) <= 1.05


@settings(max_examples=60, deadline=None)
@given(st.floats(9.5, 17), st.floats(0.4, 0.6), st.booleans())
def test_passes_converge_wherever_the_steep_part_lies(steepness, centre, bent):
    path = (curved if bent else sigmoid)(steepness, centre)
    positions = np.linspace(0, 1, FRAMES).tolist()
    for _ in range(3):
        positions = even_positions(positions, steps(path, positions), FRAMES)
        assert_sound(positions, (0.0, 1.0), FRAMES)
    assert unevenness(path, positions) <= 1.05


@pytest.mark.parametrize("path", PATHS)
def test_the_monotone_cubic_is_more_even_than_straight_lines_between_the_probes(path):
    known = probe(path)
    distances = steps(path, known)
    ours = unevenness(path, even_positions(known, distances, FRAMES))
    assert ours < unevenness(path, straight(known, distances, FRAMES))


def test_a_path_of_even_speed_is_left_alone():
    known = np.linspace(0, 1, 9).tolist()
    np.testing.assert_allclose(even_positions(known, [0.3] * 8, 17), np.linspace(0, 1, 17), atol=1e-12)
    np.testing.assert_allclose(even_positions([2.0, 3.0], [0.7], 5), np.linspace(2, 3, 5), atol=1e-12)


def test_a_path_on_which_nothing_changes_gets_uniform_positions():
    positions = even_positions([1.0, 1.1, 2.0], [0.0, 0.0], 5)
    np.testing.assert_array_equal(positions, [1.0, 1.25, 1.5, 1.75, 2.0])


def test_no_frames_are_spent_on_a_plateau():
    known = np.linspace(0, 1, 11).tolist()
    distances = [0.2, 0.2, 0.2, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2]
    positions = even_positions(known, distances, 13)
    assert_sound(positions, known, 13)
    inside = [u for u in positions if 0.32 < u < 0.68]
    assert len(inside) <= 1  # the frame of half the length lies there


@settings(max_examples=200, deadline=None)
@given(lengths_, st.integers(2, 40), st.floats(-100, 100), st.floats(1e-3, 10), st.sampled_from(EASINGS))
def test_whatever_was_measured_positions_rise_from_end_to_end(distances, count, start, width, easing):
    known = np.linspace(start, start + width, len(distances) + 1).tolist()
    assert_sound(even_positions(known, distances, count, easing), known, count)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=12, unique=True), st.data())
def test_probes_at_any_distance_from_each_other_keep_the_order(known, data):
    known = sorted(known)
    assume(np.diff(known).min() > 1e-9)
    distances = data.draw(st.lists(st.floats(0, 1), min_size=len(known) - 1, max_size=len(known) - 1))
    assert_sound(even_positions(known, distances, FRAMES), known, FRAMES)


@pytest.mark.parametrize(
    ("known", "distances", "message"),
    [
        ([0, 0.5, 1], [0.1, float("nan")], "NaN or infinite"),
        ([0, 0.5, 1], [0.1, float("inf")], "NaN or infinite"),
        ([0, 0.5, 1], [0.1, -0.1], "negative"),
        ([0, 0.5, 0.5], [0.1, 0.1], "not ascending"),
        ([0, 1], [0.1, 0.1], "2 positions, 2 distances"),
    ],
)
def test_what_cannot_be_a_measurement_is_refused(known, distances, message):
    with pytest.raises(AssertionError, match=message):
        even_positions(known, distances, 5)
    with pytest.raises(AssertionError, match=message):
        next_probe(known, distances, 2)


# Easing


@pytest.mark.parametrize("name", EASINGS)
@pytest.mark.parametrize("strength", [-0.99, 0.3, 0.99])
def test_easing_is_monotone_and_keeps_the_ends(name, strength):
    x = np.linspace(0, 1, 1001)
    y = ease(x, name, strength)
    assert y[0] == 0 and y[-1] == 1 and y.shape == x.shape
    assert (np.diff(y) > 0).all()
    np.testing.assert_allclose(y + y[::-1], 1, atol=1e-12)  # all are symmetric about the middle


def test_easing_is_slow_where_it_says():
    speed = {name: np.diff(ease(np.linspace(0, 1, 101), name)) * 100 for name in EASINGS}
    np.testing.assert_allclose(speed["linear"], 1)
    assert speed["cosine"][0] < 0.03 and speed["cosine"][50] > 1.5
    assert speed["sine"][0] > 1.49 and speed["sine"][50] < 0.51
    assert (np.diff(ease(np.linspace(0, 1, 101), "sine", -0.5))[:1] * 100 < 0.51).all()


def test_easing_acts_on_what_is_seen():
    path = sigmoid(10)
    known = np.linspace(0, 1, 33).tolist()
    positions = even_positions(known, steps(path, known), FRAMES, "cosine")
    expected = np.diff(ease(np.linspace(0, 1, FRAMES), "cosine")) * steps(path, [0, 1])
    np.testing.assert_allclose(steps(path, positions), expected, rtol=0.05)


# Frames for each segment


def test_segments_share_the_steps_by_their_length():
    assert share_frames([1, 1, 2], 16) == [4, 4, 8]
    assert share_frames([1, 1, 1], 16) == [6, 5, 5]
    assert share_frames([0, 0], 5) == [3, 2]
    assert share_frames([1, 0, 1e-9], 10) == [8, 1, 1]
    assert share_frames([0.7], 3) == [3]


@settings(max_examples=200, deadline=None)
@given(lengths_, st.integers(0, 100))
def test_every_segment_has_a_step_and_none_is_lost(lengths, spare):
    total = len(lengths) + spare
    shares = share_frames(lengths, total)
    assert sum(shares) == total and min(shares) >= 1
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(np.array(shares)[order]) >= -1).all()  # a longer one never gets fewer, ties aside


def test_the_speed_of_long_and_short_segments_is_nearly_the_same():
    lengths = [0.2, 1.0, 0.55]
    speeds = np.array(lengths) / share_frames(lengths, 50)
    assert speeds.max() / speeds.min() < 1.1
    assert (np.array(lengths) / [17, 17, 16]).max() > 1.5 * speeds.max()  # equal shares


def test_fewer_steps_than_segments_are_refused():
    with pytest.raises(AssertionError, match="each needs one"):
        share_frames([1, 1, 1], 2)


# Choice among rendered frames


def worst_and_spread(distance, chosen):
    steps_ = [distance[i, j] for i, j in zip(chosen[:-1], chosen[1:], strict=True)]
    return max(steps_), max(steps_) - min(steps_)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.data())
def test_selection_equals_brute_force(size, data):
    count = data.draw(st.integers(2, size))
    values = st.lists(st.integers(0, 9), min_size=size * size, max_size=size * size)  # ties are wanted
    distance = np.array(data.draw(values), np.float64).reshape(size, size)
    chosen = select_even(distance, count)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == size - 1
    assert (np.diff(chosen) > 0).all()
    inner = combinations(range(1, size - 1), count - 2)
    best = min(worst_and_spread(distance, [0, *between, size - 1]) for between in inner)
    assert worst_and_spread(distance, chosen) == best


@pytest.mark.parametrize("path", PATHS[:3])
def test_selection_from_many_frames_is_more_even_than_every_fourth(path):
    positions = np.linspace(0, 1, 64)
    features = np.asarray(path(positions)).reshape(64, -1)
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    chosen = select_even(distance, 8)
    uniform = np.linspace(0, 63, 8).round().astype(int)
    assert unevenness(path, positions[chosen]) < 0.5 * unevenness(path, positions[uniform])


def test_selection_wants_enough_frames_and_finite_distances():
    with pytest.raises(AssertionError, match="5 of 4 frames"):
        select_even(np.zeros((4, 4)), 5)
    with pytest.raises(AssertionError, match="NaN"):
        select_even(np.full((4, 4), np.nan), 3)


# Where to look next


def test_the_next_probes_halve_the_largest_gaps():
    assert next_probe([0, 0.5, 1], [0.1, 0.9], 1) == [0.75]
    assert next_probe([0, 0.5, 1], [0.1, 0.9], 4) == [0.25, 0.625, 0.75, 0.875]
    assert next_probe([0, 0.2, 1], [0.5, 0.5], 1) == [0.6]  # of equal changes the wider stretch
    assert next_probe([0, 0.5, 1], [0.0, 0.9], 2) == [0.625, 0.75]


def test_nothing_is_looked_at_twice_or_in_vain():
    assert next_probe([0, 0.5, 1], [0.0, 0.0], 4) == []
    assert next_probe([0, 0.5, 0.5005, 1], [0.0, 1.0, 0.0], 4) == []


@settings(max_examples=100, deadline=None)
@given(lengths_, st.integers(0, 30))
def test_probes_are_new_and_inside(distances, count):
    known = np.linspace(3, 5, len(distances) + 1).tolist()
    found = next_probe(known, distances, count)
    assert len(found) <= count and found == sorted(set(found)) and not set(found) & set(known)
    assert all(3 < u < 5 for u in found)
