"""Segment plans: which position index each token of a row gets.

Symbols as in the paper: a = text tokens, b = end-prompt tokens, L = target_length; where a method cuts its
text into chunks, their lengths stand in the place of a, and where it repeats spans of its text, their lengths
in the place of b.  Every plan returns a strictly increasing int64 array of a + b positions inside [0, L - 1];
``check`` is the guard that ``prepare`` and the collator share.
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
    """Text at 0..a-1, prompt at L-b..L-1 (paper Eq. 5).  Raises ValueError if a or b is not positive or a + b
    > L.
    """
    if a < 1 or b < 1 or a + b > L:
        raise ValueError(f"text of {a} and prompt of {b} tokens do not fit into {L} positions")
    return np.concatenate([np.arange(a, dtype=np.int64), np.arange(L - b, L, dtype=np.int64)])


def text_then_random_prompt(a: int, b: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """Text at 0..a-1, prompt at e-b..e-1 with e an integer uniform in [a + b, L] (the paper's random-position
    variant).

    Raises ValueError if a or b is not positive or a + b > L.
    """
    if a < 1 or b < 1 or a + b > L:
        raise ValueError(f"text of {a} and prompt of {b} tokens do not fit into {L} positions")
    return text_then_end_prompt(a, b, int(rng.integers(a + b, L, endpoint=True)), rng)


def chunk_lengths(a: int, chunks: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 lengths of the ``chunks`` parts into which PoSE cuts ``a`` tokens; their sum is a.

    Two chunks: the first is uniform in 1..(a+1)//2, as in the code of github.com/dwzhu-pku/PoSE (so that one
    token leaves the second empty).  k chunks, of which PoSE's code has no example: k-1 distinct cuts, sorted,
    uniform in 1..(k-1)(a+1)//k, which is the same for k = 2; fewer where a row is too short for that many.
    Raises ValueError if a or chunks is not positive.
    """
    if a < 1 or chunks < 1:
        raise ValueError(f"{a} tokens cannot be cut into {chunks} chunks")
    last_cut = (chunks - 1) * (a + 1) // chunks
    cuts = np.sort(rng.choice(last_cut, min(chunks - 1, last_cut), replace=False)) + 1
    return np.diff(cuts, prepend=0, append=a).astype(np.int64)


def spread(chunks: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 indices of consecutive ``chunks`` [k] (lengths in tokens) laid out in [0, length - 1]: the first
    begins at 0.

    Each later one is shifted by a skip uniform in [skip before, length - all tokens] (PoSE, arXiv 2309.10400,
    Eq. 4 for positions and Eq. 5 for the text that a chunk takes).  Raises ValueError if the chunks do not
    fit.
    """
    n, skips = int(np.sum(chunks)), [0]
    if not 0 < n <= length:
        raise ValueError(f"chunks of {n} tokens do not fit into {length} positions")
    for _ in chunks[1:]:
        skips.append(int(rng.integers(skips[-1], length - n, endpoint=True)))
    return np.arange(n, dtype=np.int64) + np.repeat(np.array(skips, np.int64), chunks)


def skipwise(chunks: np.ndarray, b: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """Text in ``chunks`` [k] spread over 0..L-1 (PoSE).  ``b`` must be 0.  Raises ValueError if the row does
    not fit into L.
    """
    if b:
        raise ValueError("a skip-wise row has no end prompt")
    return spread(chunks, L, rng)


def skipwise_then_end_prompt(chunks: np.ndarray, b: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """Text in ``chunks`` [k] spread over 0..L-b-1, prompt at L-b..L-1 (the paper's ET(PoSE)).  Raises
    ValueError as the other plans do.
    """
    if b < 1:
        raise ValueError(f"a prompt of {b} tokens does not fit: it needs at least one")
    return np.concatenate([spread(chunks, L - b, rng), np.arange(L - b, L, dtype=np.int64)])


def skipwise_then_recall(
    chunks: np.ndarray, spans: np.ndarray, L: int, rng: np.random.Generator
) -> np.ndarray:
    """Text in ``chunks`` [k], then ``spans`` [m] of tokens that repeat some of it, the first chunk at 0 and
    the rest scattered over 0..L-1.

    Each of the k + m - 1 later segments is shifted by a skip; the skips are uniform in [0, L - all tokens],
    in order, so that all of the far positions are reached by every segment and not, as with PoSE's nested
    draws, by the last ones most of all.  Raises ValueError if the segments do not fit.
    """
    lengths = np.concatenate([chunks, spans]).astype(np.int64)
    n = int(lengths.sum())
    if not 0 < n <= L or len(chunks) == 0:
        raise ValueError(f"text and spans of {n} tokens do not fit into {L} positions")
    skips = np.sort(rng.integers(0, L - n, len(lengths) - 1, endpoint=True))
    return np.arange(n, dtype=np.int64) + np.repeat(np.concatenate([[0], skips]).astype(np.int64), lengths)


def check(position_ids: np.ndarray, L: int) -> None:
    """Raises ValueError unless ``position_ids`` [T] are strictly increasing and inside [0, L - 1]."""
    if len(position_ids) == 0:
        raise ValueError("a row without tokens")
    if position_ids[0] < 0 or position_ids[-1] >= L:
        raise ValueError(f"positions {position_ids[0]}..{position_ids[-1]} leave [0, {L - 1}]")
    if np.any(np.diff(position_ids) <= 0):
        raise ValueError(
            f"positions do not increase at token {int(np.argmax(np.diff(position_ids) <= 0)) + 1}"
        )


def segments(position_ids: np.ndarray) -> list[tuple[int, int]]:
    """The maximal runs of consecutive positions of a row, as inclusive (first, last) pairs."""
    position_ids = np.asarray(position_ids)
    cuts = np.flatnonzero(np.diff(position_ids) != 1) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(position_ids, cuts)]
