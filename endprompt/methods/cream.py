"""CREAM (arXiv 2406.07138): a head, a middle and a tail, whose middle stands where a Gaussian draws it.

After github.com/bigai-nlco/CREAM, src/train.py.  Head and tail are k tokens each at 0..k-1 and L-k..L-1, with
k a third of the row or, as often, 4 s tokens (s = L / row length).  The middle's last position is uniform
between the two that would keep the row's order in a window of f / 2 rows' length, and f comes from a Gaussian
of mean 1 + s on [2, 2 s].

Ours where the source leaves it open or is tied to its sizes: the coin for k is thrown for every row, there
for every 3000; k stays at a third where 4 s is more; a document shorter than a row counts as a row of its
length.  Its text is always that of the places that the positions name (``cream_text: matching``), here it is
contiguous unless asked for, as documents of L tokens are few.  The paper calls the Gaussian truncated; its
code clips it, and so does this."""

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from endprompt import BadInput
from endprompt.methods.base import Method, Options, Rows, register

ENDS = 4  # tokens of head and of tail in each row's length of the target, where they are short


class CreamOptions(Options):
    cream_sigma: float = Field(
        3.0, gt=0, description="standard deviation of the factor whose draw says where the middle ends"
    )
    cream_text: Literal["contiguous", "matching"] = Field(
        "contiguous",
        description="matching, as in CREAM's code: chunks are taken from the places of their document that"
        " their positions name, the tail from the end of its first lengths.target tokens",
    )

    @field_validator("cream_sigma", mode="before")
    @classmethod
    def real(cls, value):
        return float(value) if type(value) is int else value


def chunks(n: int, L: int, sigma: float, rng: np.random.Generator) -> tuple[int, int]:
    """(tokens of the head, as many of the tail; the middle's last position) of a row of n tokens.  Raises
    ValueError if n tokens do not fit into L."""
    if not 0 < n <= L:
        raise ValueError(f"{n} tokens do not fit into {L} positions")
    s = L / n
    k = n // 3 if rng.integers(2) == 0 else min(int(ENDS * s), n // 3)
    half = int(np.clip(rng.normal(1 + s, sigma), 2, 2 * s)) / 2
    first, last = int(k + (n - 2 * k - 1) * half), int(half * n) - k - 1
    return k, int(rng.integers(first, last, endpoint=True))


def placed(n: int, k: int, end: int, L: int) -> np.ndarray:
    """Int64 [n]: a head of k at 0, n - 2 k tokens that end at ``end``, a tail of k that ends at L-1."""
    middle = n - 2 * k
    return np.concatenate([np.arange(k), np.arange(end - middle + 1, end + 1), np.arange(L - k, L)])


class CreamRows(Rows):
    def build(self, cursor, rng):
        matching = self.options.cream_text == "matching"
        if (taken := self.take(cursor, self.length, self.target_length if matching else None)) is None:
            return None
        text, documents = taken
        n, L = min(len(text), self.length), self.target_length
        k, end = chunks(n, L, self.options.cream_sigma, rng)
        if matching:  # a middle beyond the document is what comes before its tail
            text = text[placed(n, k, min(end, len(text) - k - 1), len(text))]
        return self.row(text, placed(n, k, end, L), documents)


@register
class Cream(Method):
    name = "cream"
    summary = "text in a head at 0, a middle drawn around the centre, a tail that ends at L-1"
    Options = CreamOptions
    Rows = CreamRows

    def check(self, options, packing):
        if options.cream_text == "matching" and packing == "cut":
            raise BadInput(
                "method_options.cream_text: matching takes chunks from all over a document, but with"
                " data.packing: cut a row has no document of its own and the text between would be lost; set"
                " data.packing=document, or method_options.cream_text=contiguous"
            )
