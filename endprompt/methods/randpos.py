"""Random positions: a sorted random subset of the target's, the baseline of CREAM (arXiv 2406.07138).

As in github.com/bigai-nlco/CREAM, src/train.py, every subset is equally likely.  Where a row then begins is
random too.  Randomized positional encodings (2305.16843) draw them so for models that are trained from
scratch.  Neither says what the draw does to neighbours: in a window of s rows' length they stand s apart.
"""

import numpy as np

from endprompt.methods.base import Method, Rows, register


def subset(n: int, L: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 [n] of 0..L-1 in order.  Raises ValueError if there are not so many."""
    if not 0 < n <= L:
        raise ValueError(f"{n} tokens do not fit into {L} positions")
    return np.sort(rng.choice(L, n, replace=False)).astype(np.int64)


class RandomRows(Rows):
    def build(self, cursor, rng):
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        return self.row(text, subset(len(text), self.target_length, rng), documents)


@register
class RandPos(Method):
    name = "randpos"
    summary = "text at a sorted random subset of the positions 0..L-1"
    Rows = RandomRows
