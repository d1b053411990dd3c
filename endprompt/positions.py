"""Segment plans: which position index each token of a row gets, and which distances a row then supervises.

Symbols as in the paper: a = text tokens, b = end-prompt tokens, L = target_length.  Every plan returns a strictly increasing
int64 array of a + b positions inside [0, L - 1]; ``check`` is the guard that ``prepare`` and the collator share.
"""

import numpy as np


def contiguous(a: int, b: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """0..a-1: an ordinary row.  ``b`` must be 0.  Raises ValueError if the row does not fit into L."""
    if b:
        raise ValueError("a contiguous row has no end prompt")
    if not 0 < a <= L:
        raise ValueError(f"{a} text tokens do not fit into {L} positions")
    return np.arange(a, dtype=np.int64)


def text_then_end_prompt(a: int, b: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """Text at 0..a-1, prompt at L-b..L-1 (paper Eq. 5).  Raises ValueError if a or b is not positive or a + b > L."""
    if a < 1 or b < 1 or a + b > L:
        raise ValueError(f"text of {a} and prompt of {b} tokens do not fit into {L} positions")
    return np.concatenate([np.arange(a, dtype=np.int64), np.arange(L - b, L, dtype=np.int64)])


def check(position_ids: np.ndarray, L: int) -> None:
    """Raises ValueError unless ``position_ids`` [T] are strictly increasing and inside [0, L - 1]."""
    if len(position_ids) == 0:
        raise ValueError("a row without tokens")
    if position_ids[0] < 0 or position_ids[-1] >= L:
        raise ValueError(f"positions {position_ids[0]}..{position_ids[-1]} leave [0, {L - 1}]")
    if np.any(np.diff(position_ids) <= 0):
        raise ValueError(f"positions do not increase at token {int(np.argmax(np.diff(position_ids) <= 0)) + 1}")


def segments(position_ids: np.ndarray) -> list[tuple[int, int]]:
    """The maximal runs of consecutive positions of a row, as inclusive (first, last) pairs."""
    position_ids = np.asarray(position_ids)
    cuts = np.flatnonzero(np.diff(position_ids) != 1) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(position_ids, cuts)]


def observed_distances(position_ids: np.ndarray) -> np.ndarray:
    """All distinct query-key distances of one causal row, sorted, as a union over its segments (paper Eq. 8).

    Two segments [p, q] and [r, s] with q < r contribute r-q..s-p; a segment [p, q] contributes 0..q-p.
    """
    parts = segments(position_ids)
    spans = [(0, last - first) for first, last in parts]
    spans += [(r - q, s - p) for i, (p, q) in enumerate(parts) for r, s in parts[i + 1:]]
    return np.unique(np.concatenate([np.arange(low, high + 1, dtype=np.int64) for low, high in spans]))


def distance_gap(a: int, b: int, L: int) -> tuple[int, int] | None:
    """The inclusive range of distances that no ``text_then_end_prompt`` row shows (paper Eq. 9); None if there is no gap."""
    low, high = max(a, b), L - a - b
    return (low, high) if low <= high else None
