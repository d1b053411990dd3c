"""Pieces of a stretch of text, brought together by what they repeat.

Facts, names and phrases come back far from where they first stood, which a row of a window's length seldom
holds.  Rows of a few pieces that share n-grams do: what is late in such a row can be foretold from what is
early in it, across the jump of positions between them.  Every token of the stretch stays in one row, in its
order.
"""

from collections.abc import Callable

import numpy as np
from scipy import sparse


def grams(pieces: np.ndarray, n: int) -> sparse.csr_array:
    """Float32 [g, p], 1 where one of ``pieces`` [p, size] (token ids) holds an n-gram, of those that at least
    two of them hold.

    Two n-grams pass for one if their 64-bit hashes are equal.
    """
    windows = np.lib.stride_tricks.sliding_window_view(
        pieces.astype(np.uint64), min(n, pieces.shape[1]), axis=1
    )
    hashes = np.zeros(windows.shape[:2], np.uint64)
    for column in range(windows.shape[2]):  # FNV-1a, an id at a time; it wraps on purpose
        hashes = (hashes ^ windows[:, :, column]) * np.uint64(1099511628211)
    number = np.unique(hashes, return_inverse=True)[1].reshape(hashes.shape)
    count = len(pieces)
    pairs = np.unique(number * count + np.arange(count)[:, None])
    gram, piece = np.divmod(pairs, count)
    several = np.bincount(gram) > 1
    kept = several[gram]
    gram = (np.cumsum(several) - 1)[gram[kept]]
    ones = np.ones(len(gram), np.float32)
    return sparse.csr_array((ones, (gram, piece[kept])), shape=(int(several.sum()), count))


Gain = Callable[[np.ndarray, np.ndarray], np.ndarray]


def groups(
    pieces: np.ndarray, together: int, n: int, rng: np.random.Generator, gain: Gain | None = None
) -> list[list[int]]:
    """The numbers of ``pieces`` [p, size] in groups of ``together``, each ascending, all in the order of
    their first piece.

    Greedily: the two pieces that share most n-grams first, among equals at random; then pairs of pairs alike,
    until a group is full.
    gain: of pieces and the n-grams that they share, float [p, p]: what every piece gains from an earlier one.
        The two that gain most then come first, and n-grams count among equals; of groups, the sum over all
        pairs of their pieces.

    Raises ValueError unless ``together`` is a power of two and p a multiple of it.
    """
    if together < 1 or together & (together - 1) or len(pieces) % together:
        raise ValueError(
            f"{len(pieces)} pieces do not make groups of {together}; a power of two that divides them is"
            " wanted"
        )
    held, found = grams(pieces, n), [[number] for number in range(len(pieces))]
    gains = None if gain is None else gain(pieces, (held.T @ held).toarray())
    while len(found[0]) < together:
        shared = (held.T @ held).toarray()
        first, second = np.triu_indices(len(found), 1)
        keys = [rng.random(len(first)), -shared[first, second]]
        if gains is not None:
            keys.append(-(gains + gains.T)[first, second])
        order = np.lexsort(tuple(keys))
        free, merged = np.ones(len(found), bool), []
        for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if free[one] and free[other]:
                free[one] = free[other] = False
                merged.append((one, other))
        ones, others = map(list, zip(*merged, strict=True))
        held = held[:, ones].maximum(held[:, others])
        if gains is not None:
            gains = gains[ones] + gains[others]
            gains = gains[:, ones] + gains[:, others]
        found = [sorted(found[one] + found[other]) for one, other in merged]
    return sorted(found)
