"""E2-LLM (arXiv 2401.06951): contiguous rows under a scale and an offset drawn for every row.

There the angle of position p in a row of scale g is that of p / g, with g below or at the scale that the
model will be read with.  Under a model of scale s these are the angles of every (s / g)-th position, so rows
hold whole positions and the model stays as it is: a row's stride k is whole, and its scale s / k.  A row of
stride k begins anywhere from where it still ends below L.

Known from the abstract alone; how g and the offset are distributed is open.  Here g is uniform in [1, s] and
raised to the next s / k, so that most rows have the strides that the model is read with, and the offset is
uniform.  s is counted from the row's length, which is to be the base's window.
"""

import numpy as np

from endprompt.methods.base import Method, Rows, register


def strided(n: int, most: float, L: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 [n] positions at a stride of at most ``most``, from a drawn offset.  Raises ValueError if n
    tokens do not fit into L."""
    if not 0 < n <= L:
        raise ValueError(f"{n} tokens do not fit into {L} positions")
    stride = max(1, int(most / rng.uniform(1, max(1, most))))
    offset = int(rng.integers(0, L - stride * (n - 1)))
    return offset + stride * np.arange(n)


class StridedRows(Rows):
    def build(self, cursor, rng):
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        positions = strided(len(text), self.target_length / self.length, self.target_length, rng)
        return self.row(text, positions, documents)


@register
class E2Llm(Method):
    name = "e2llm"
    summary = "text at every k-th position from a drawn offset: a drawn scale of position interpolation"
    Rows = StridedRows
