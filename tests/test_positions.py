"""Segment plans of every trained method, and the distances a row supervises (paper Eq. 5, 8, 9)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endprompt import positions
from endprompt.methods import METHODS

TRAINED = [method for method in METHODS.values() if method.trained]
GENERATOR = np.random.default_rng(0)

each_trained = pytest.mark.parametrize("method", TRAINED, ids=[method.name for method in TRAINED])


def plan(method, a, b, L):
    return method.plan(a, b if method.end_prompt else 0, L, np.random.default_rng(a))


@st.composite
def fitting(draw, largest=3000):
    """(a, b, L) with a + b <= L; the exact fit comes up often."""
    a, b = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return a, b, a + b + draw(st.sampled_from([0, 1]) | st.integers(0, 70000))


@st.composite
def rows(draw):
    """Strictly increasing positions of a short row, and a length that holds them."""
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]) | st.integers(1, 60), min_size=1, max_size=24))
    row = np.cumsum(steps) - draw(st.integers(0, 1)) * steps[0]
    return row.astype(np.int64), int(row[-1]) + draw(st.integers(1, 5))


def brute_force(row):
    return sorted({int(query - key) for i, query in enumerate(row) for key in row[: i + 1]})


@each_trained
@given(sizes=fitting())
def test_plan(method, sizes):
    a, b, L = sizes
    row = plan(method, a, b, L)
    assert row.dtype == np.int64
    assert row[:a].tolist() == list(range(a))
    assert np.all(np.diff(row) > 0)
    assert row[0] >= 0 and row[-1] < L
    if method.end_prompt:
        assert len(row) == a + b
        assert row[-1] == L - 1
        assert row[a:].tolist() == list(range(L - b, L))
    else:
        assert len(row) == a
    positions.check(row, L)


@each_trained
@given(a=st.integers(1, 200), b=st.integers(1, 200), short=st.integers(1, 400))
def test_plan_that_does_not_fit(method, a, b, short):
    L = (a + b if method.end_prompt else a) - short
    with pytest.raises(ValueError, match="fit"):
        plan(method, a, b, L)


@pytest.mark.parametrize("a, b", [(0, 4), (-1, 4), (4, 0), (4, -1)])
def test_end_prompt_plan_wants_text_and_prompt(a, b):
    with pytest.raises(ValueError, match="fit"):
        positions.text_then_end_prompt(a, b, 100, GENERATOR)


@pytest.mark.parametrize("a, b, message", [(0, 0, "fit"), (-3, 0, "fit"), (4, 2, "no end prompt")])
def test_contiguous_wants_text_alone(a, b, message):
    with pytest.raises(ValueError, match=message):
        positions.contiguous(a, b, 100, GENERATOR)


@given(rows())
def test_observed_distances_are_those_of_all_causal_pairs(row_and_length):
    row, L = row_and_length
    assert positions.observed_distances(row).tolist() == brute_force(row)
    positions.check(row, L)


@given(rows())
def test_segments_cover_the_row(row_and_length):
    row, _ = row_and_length
    parts = positions.segments(row)
    assert [p for first, last in parts for p in range(first, last + 1)] == row.tolist()
    assert all(later[0] > earlier[1] + 1 for earlier, later in zip(parts, parts[1:], strict=False))


@given(fitting(largest=40).map(lambda sizes: (sizes[0], sizes[1], min(sizes[2], sizes[0] + sizes[1] + 300))))
def test_distances_of_text_then_end_prompt(sizes):
    a, b, L = sizes
    row = positions.text_then_end_prompt(a, b, L, GENERATOR)
    observed = positions.observed_distances(row)
    closed = set(range(a)) | set(range(b)) | set(range(L - a - b + 1, L))
    assert observed.tolist() == sorted(closed) == brute_force(row)
    gap = positions.distance_gap(a, b, L)
    missing = sorted(set(range(L)) - closed)
    assert missing == (list(range(gap[0], gap[1] + 1)) if gap else [])


def test_gap_of_the_paper():
    a, b, L = 8172, 20, 65536
    assert positions.distance_gap(a, b, L) == (8172, 57344)
    observed = positions.observed_distances(positions.text_then_end_prompt(a, b, L, GENERATOR))
    assert observed.tolist() == [*range(8172), *range(57345, 65536)]


def test_no_gap_where_the_row_spans_half_the_window():
    assert positions.distance_gap(50, 10, 100) is None
    assert positions.distance_gap(50, 10, 110) == (50, 50)


@pytest.mark.parametrize("row, L, message", [
    ([], 8, "without tokens"),
    ([-1, 0, 1], 8, "leave"),
    ([0, 1, 8], 8, "leave"),
    ([0, 1, 1], 8, "token 2"),
    ([0, 3, 2], 8, "token 2"),
    ([0, 9, 2], 8, "token 2"),
    ([2, 1, 0], 8, "token 1"),
])
def test_check_refuses(row, L, message):
    with pytest.raises(ValueError, match=message):
        positions.check(np.array(row, np.int64), L)


@pytest.mark.parametrize("row, L", [([0], 1), ([7], 8), ([0, 1, 7], 8), (list(range(8)), 8)])
def test_check_accepts(row, L):
    positions.check(np.array(row, np.int64), L)
