"""Segment plans of every method that trains (paper Eq. 5; PoSE Eq. 3-5)."""

from itertools import repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endprompt.methods import METHODS
from endprompt.methods.base import Setting
from endprompt.methods.cream import CreamRows
from endprompt.methods.e2llm import StridedRows
from endprompt.methods.end_prompt import EndPromptRows
from endprompt.methods.longrecipe import SentenceRows
from endprompt.methods.matched import MatchedRows
from endprompt.methods.pose import Chunks
from endprompt.methods.randpos import RandomRows
from endprompt.methods.recall import RecallRows
from endprompt.positions import plans
from endprompt.rows.stream import Cursor

TRAINED = [method for method in METHODS.values() if method.trained]
SPAN = 500  # tokens a repeated span; the last may be shorter
GENERATOR = np.random.default_rng(0)

each_trained = pytest.mark.parametrize("method", TRAINED, ids=[method.name for method in TRAINED])


def has(method, kind: type) -> bool:
    """Whether its rows are of that kind."""
    return issubclass(method.Rows, kind)


class Letters:
    """A tokenizer that makes a token of each letter; that of id 2 ends a sentence."""

    unk_token_id, eos_token_id = None, 0

    def __len__(self):
        return 3

    def batch_decode(self, rows):
        return [["", "a", "."][row[0]] for row in rows]

    def __call__(self, text, **options):
        return {"input_ids": [1] * len(text)}


def span(a: int) -> int:
    """Tokens of a repeated span, which no text of a tokens may fall short of."""
    return min(SPAN, a)


def plan(method, a, b, L, chunks=2, seed=None):
    """The positions that the method's own rows give to a tokens of text in so many chunks and, where it has
    an ending, b tokens of it."""
    rng = np.random.default_rng(a if seed is None else seed)
    given = {"end_prompts": ["e" * b], "pose_chunks": chunks, "recall_cue": 1, "recall_tokens": 1}
    known = method.Options.model_fields
    options = method.Options(**{key: value for key, value in given.items() if key in known})
    length = a if method.Rows.uniform else a + b
    # Checks of recipes' lengths are not what is tried: they get a length that they take.
    rows = method.Rows(
        Setting(method.name, options, max(length, 4) // 4 * 4, L, "cut", 0, Letters())
        if has(method, RecallRows | MatchedRows)
        else Setting(method.name, options, length, L, "cut", 0, Letters())
    )
    rows.length = length
    if has(method, RecallRows):
        rows.spans = np.diff([0, *range(span(a), b, span(a)), b])
    if has(method, MatchedRows):
        rows.pieces, rows.waiting = plans.chunk_lengths(a, chunks, rng), [(np.zeros(a, np.int32), [])]
    rows.row = lambda text, position_ids, *rest: position_ids
    return rows.build(Cursor(repeat(("", np.zeros(length, np.int32))), 0, 0), rng)


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


@each_trained
@given(sizes=fitting(), chunks=st.integers(2, 5))
def test_plan(method, sizes, chunks):
    a, b, L = sizes
    row = plan(method, a, b, L, chunks)
    assert row.dtype == np.int64
    assert len(row) == (a + b if not method.Rows.uniform else a)
    assert np.all(np.diff(row) > 0)
    headless = has(method, RandomRows | StridedRows) or has(method, CreamRows) and a < 3
    assert (row[0] == 0 or headless) and row[-1] < L
    if has(method, EndPromptRows):
        end = row[-1] + 1 if method.name == "endprompt_random" else L
        assert row[a:].tolist() == list(range(end - b, end))
        assert row[a - 1] <= end - b - 1
    if has(method, RecallRows):
        assert all(
            len(plans.segments(row[first : first + span(a)][: a + b - first])) == 1
            for first in range(a, a + b, span(a))
        )
    if has(method, Chunks | MatchedRows):
        assert len(plans.segments(row[:a])) <= chunks
    elif not has(method, RandomRows | StridedRows | CreamRows | SentenceRows):  # tests/test_neighbours.py
        assert row[:a].tolist() == list(range(a))
    plans.check(row, L)


@each_trained
@given(sizes=fitting(largest=60), seed=st.integers(0, 2**32))
def test_plan_is_the_same_for_the_same_generator(method, sizes, seed):
    a, b, L = sizes
    assert plan(method, a, b, L, seed=seed).tolist() == plan(method, a, b, L, seed=seed).tolist()


@each_trained
@given(a=st.integers(1, 200), b=st.integers(1, 200), short=st.integers(1, 400))
def test_plan_that_does_not_fit(method, a, b, short):
    L = (a + b if not method.Rows.uniform else a) - short
    with pytest.raises(ValueError, match="fit"):
        plan(method, a, b, L)


@pytest.mark.parametrize("a, b", [(0, 4), (-1, 4), (4, 0), (4, -1)])
@pytest.mark.parametrize("function", [plans.text_then_end_prompt, plans.text_then_random_prompt])
def test_end_prompt_plans_want_text_and_prompt(function, a, b):
    with pytest.raises(ValueError, match="fit"):
        function(a, b, 100, GENERATOR)


def test_random_prompt_ends_anywhere():
    """Every end in [a + b, L], each about as often (paper's random-position variant)."""
    a, b, L = 5, 3, 12
    rng = np.random.default_rng(3)
    ends = np.array([plans.text_then_random_prompt(a, b, L, rng)[-1] + 1 for _ in range(5000)])
    values, times = np.unique(ends, return_counts=True)
    assert values.tolist() == [8, 9, 10, 11, 12]
    assert np.all(np.abs(times - 1000) < 150)  # 5 standard deviations
    assert plans.text_then_random_prompt(a, b, 8, rng).tolist() == list(range(8))


@given(a=st.integers(1, 300), chunks=st.integers(1, 320), seed=st.integers(0, 2**32))
def test_chunk_lengths(a, chunks, seed):
    parts = plans.chunk_lengths(a, chunks, np.random.default_rng(seed))
    assert parts.dtype == np.int64
    assert parts.sum() == a
    assert np.all(parts[:-1] > 0) and parts[-1] >= 0
    assert len(parts) == min(chunks, 1 + (chunks - 1) * (a + 1) // chunks)
    assert parts[-1] >= a - (chunks - 1) * (a + 1) // chunks


@pytest.mark.parametrize("a", [1, 2, 7, 8])
def test_first_of_two_chunks(a):
    """U[1, (n+1)//2], as in PoSE's code."""
    rng = np.random.default_rng(a)
    firsts = [int(plans.chunk_lengths(a, 2, rng)[0]) for _ in range(4000)]
    values, times = np.unique(firsts, return_counts=True)
    assert values.tolist() == list(range(1, (a + 1) // 2 + 1))
    assert np.all(np.abs(times - 4000 / len(values)) < 150)


@pytest.mark.parametrize("a, chunks", [(0, 2), (-1, 2), (5, 0)])
def test_chunk_lengths_refuse(a, chunks):
    with pytest.raises(ValueError, match="cannot be cut"):
        plans.chunk_lengths(a, chunks, GENERATOR)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    st.integers(0, 200),
    st.integers(0, 2**32),
)
def test_spread(chunks, room, seed):
    n = sum(chunks)
    row = plans.spread(np.array(chunks), n + room, np.random.default_rng(seed))
    skips = row - np.arange(n)
    assert row.dtype == np.int64 and len(row) == n
    assert np.all(np.diff(skips) >= 0) and skips[0] >= 0 and skips[-1] <= room
    assert np.all(skips[: chunks[0]] == 0)
    starts = np.cumsum([0, *chunks])
    assert all(len(set(skips[low:high])) <= 1 for low, high in zip(starts, starts[1:], strict=False))


def test_spread_skips():
    """One skip is uniform in [0, L - n]; of two, the second is uniform from the first on (PoSE Eq. 4)."""
    rng = np.random.default_rng(1)
    values, times = np.unique(
        [plans.spread(np.array([2, 3]), 9, rng)[-1] - 4 for _ in range(5000)], return_counts=True
    )
    assert values.tolist() == [0, 1, 2, 3, 4] and np.all(np.abs(times - 1000) < 150)
    rows = [plans.spread(np.array([1, 1, 1]), 4, rng) for _ in range(4000)]
    values, times = np.unique([row[1:] - [1, 2] for row in rows], axis=0, return_counts=True)
    assert values.tolist() == [[0, 0], [0, 1], [1, 1]] and np.all(np.abs(times - [1000, 1000, 2000]) < 170)


@pytest.mark.parametrize("chunks, length", [([3, 3], 5), ([0], 5), ([1], -2)])
def test_spread_refuses(chunks, length):
    with pytest.raises(ValueError, match="fit"):
        plans.spread(np.array(chunks), length, GENERATOR)


def test_skipwise_plans_want_the_right_prompt():
    with pytest.raises(ValueError, match="no end prompt"):
        plans.skipwise(np.array([2, 2]), 1, 100, GENERATOR)
    with pytest.raises(ValueError, match="fit"):
        plans.skipwise_then_end_prompt(np.array([2, 2]), 0, 100, GENERATOR)


def test_recall_skips():
    """Chunks of 2 and 1 and a span of 2 in 8 positions: both skips are in 0..3, in order, each pair of draws
    as often as another.
    """
    rng = np.random.default_rng(2)
    rows = np.array(
        [plans.skipwise_then_recall(np.array([2, 1]), np.array([2]), 8, rng) for _ in range(8000)]
    )
    assert np.all(rows[:, :2] == [0, 1]) and np.all(rows[:, 4] == rows[:, 3] + 1)
    values, times = np.unique(rows[:, 2:4] - [2, 3], axis=0, return_counts=True)
    assert values.tolist() == [[low, high] for low in range(4) for high in range(low, 4)]
    expected = [500 if low == high else 1000 for low, high in values.tolist()]
    assert np.all(np.abs(times - expected) < 150)


def test_recall_reaches_everywhere_from_every_segment():
    """The mean skip of the i-th of m later segments is i / (m + 1) of the room, where PoSE's nested draws
    would be at 1 - 2^-i.
    """
    rng = np.random.default_rng(4)
    rows = np.array(
        [plans.skipwise_then_recall(np.array([2, 2]), np.array([2, 2]), 1008, rng) for _ in range(4000)]
    )
    assert rows[:, [2, 4, 6]].mean(0) - [2, 4, 6] == pytest.approx([250, 500, 750], abs=20)


@pytest.mark.parametrize("chunks, spans, L", [([3, 3], [2], 7), ([0], [], 5), ([], [2], 5), ([2], [2], -2)])
def test_recall_refuses(chunks, spans, L):
    with pytest.raises(ValueError, match="fit"):
        plans.skipwise_then_recall(np.array(chunks), np.array(spans, np.int64), L, GENERATOR)
    assert plans.skipwise_then_recall(np.array([3]), np.zeros(0, np.int64), 3, GENERATOR).tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("a, b, message", [(0, 0, "fit"), (-3, 0, "fit"), (4, 2, "no end prompt")])
def test_contiguous_wants_text_alone(a, b, message):
    with pytest.raises(ValueError, match=message):
        plans.contiguous(a, b, 100, GENERATOR)


@given(rows())
def test_segments_cover_the_row(row_and_length):
    row, _ = row_and_length
    parts = plans.segments(row)
    assert [p for first, last in parts for p in range(first, last + 1)] == row.tolist()
    assert all(later[0] > earlier[1] + 1 for earlier, later in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    "row, L, message",
    [
        ([], 8, "without tokens"),
        ([-1, 0, 1], 8, "leave"),
        ([0, 1, 8], 8, "leave"),
        ([0, 1, 1], 8, "token 2"),
        ([0, 3, 2], 8, "token 2"),
        ([0, 9, 2], 8, "token 2"),
        ([2, 1, 0], 8, "token 1"),
    ],
)
def test_check_refuses(row, L, message):
    with pytest.raises(ValueError, match=message):
        plans.check(np.array(row, np.int64), L)


@pytest.mark.parametrize("row, L", [([0], 1), ([7], 8), ([0, 1, 7], 8), (list(range(8)), 8)])
def test_check_accepts(row, L):
    plans.check(np.array(row, np.int64), L)
