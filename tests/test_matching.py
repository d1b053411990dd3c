"""Pieces that are brought together: by hand, against sets, and what always holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from endprompt.methods import matching


def rng():
    return np.random.default_rng(0)


def test_by_hand():
    """0 and 3 share 1 2 3, 1 and 2 share 7 8; of 4 and 5, which share nothing, each is the other's only one
    left.
    """
    pieces = np.array(
        [[1, 2, 3, 40], [7, 8, 50, 51], [60, 61, 7, 8], [70, 1, 2, 3], [80, 81, 82, 83], [90, 91, 92, 93]]
    )
    assert matching.groups(pieces, 2, 2, rng()) == [[0, 3], [1, 2], [4, 5]]
    assert matching.grams(pieces, 2).sum(axis=0).tolist() == [2, 1, 1, 2, 0, 0]
    assert matching.grams(pieces, 3).sum(axis=0).tolist() == [1, 0, 0, 1, 0, 0]
    assert matching.grams(pieces, 9).shape == (
        0,
        6,
    )  # longer than a piece: whole pieces, of which no two are alike


def test_pairs_of_pairs():
    """{0, 2} and {1, 3} are joined by 5 6, which 2 and 3 hold; so are the others by what they do not share
    with them.
    """
    pieces = np.array(
        [
            [1, 2, 9, 10],
            [3, 4, 11, 12],
            [1, 2, 5, 6],
            [3, 4, 5, 6],
            [20, 21, 22, 23],
            [20, 21, 24, 25],
            [26, 27, 28, 29],
            [26, 27, 24, 25],
        ]
    )
    assert matching.groups(pieces, 4, 2, rng()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(
    arrays(np.int32, st.tuples(st.integers(2, 8), st.integers(1, 12)), elements=st.integers(0, 5)),
    st.integers(1, 6),
)
def test_grams_are_those_of_sets(pieces, n):
    n_of = min(n, pieces.shape[1])
    sets = [{tuple(piece[at : at + n_of]) for at in range(len(piece) - n_of + 1)} for piece in pieces]
    held = matching.grams(pieces, n).astype(int)
    assert [[int(value) for value in row] for row in held.T @ held] == [
        [len({gram for gram in one & other if sum(gram in found for found in sets) > 1}) for other in sets]
        for one in sets
    ]


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_every_piece_is_in_one_group_and_in_order(power, count, size, seed):
    together = 2**power
    pieces = np.random.default_rng(seed).integers(0, 4, (count * together, size))
    found = matching.groups(pieces, together, 3, np.random.default_rng(seed))
    assert (
        sorted(number for group in found for number in group) == list(range(len(pieces)))
        and len(found) == count
    )
    assert all(group == sorted(group) for group in found) and found == sorted(found)
    assert found == matching.groups(pieces, together, 3, np.random.default_rng(seed))


@pytest.mark.parametrize("count, together", [(4, 3), (6, 4), (4, 0), (5, 2)])
def test_groups_that_do_not_come_out_even(count, together):
    with pytest.raises(ValueError, match=f"{count} pieces do not make groups of {together}"):
        matching.groups(np.zeros((count, 4), int), together, 2, rng())


def test_large_ids_are_told_apart():
    """Neighbouring ids of a large vocabulary, in another order, are other n-grams."""
    pieces = np.array([[128000, 128001, 1], [128001, 128000, 2], [128000, 128001, 3], [5, 6, 7]])
    assert matching.grams(pieces, 2).sum(axis=0).tolist() == [1, 0, 1, 0]
