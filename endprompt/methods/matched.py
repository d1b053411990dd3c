"""Rows of pieces that repeat something of each other, or that tell something about each other, from all over
a stretch of L tokens.

Which pieces come together is said by the n-grams that they share, or by the base (``match_by: gain``): its
loss of a piece after unrelated text, minus that after another piece.  This is LongFilter's score (arXiv
2510.25804) between two pieces.  Only pieces that share n-grams are told to the base, the best few for each,
so that it reads 2 + 2 x match_candidates tokens for every token of text.
"""

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from endprompt import BadInput
from endprompt.bases import gain
from endprompt.methods import matching
from endprompt.methods.base import Method, Options, Rows, register
from endprompt.positions import plans


class MatchOptions(Options):
    match_pieces: int = Field(4, ge=2, description="pieces of a row, a power of two")
    match_tokens: int = Field(
        5,
        gt=0,
        description="n of the n-grams by which pieces are compared: every run of n tokens that two pieces"
        " share counts once",
    )
    match_by: Literal["ngrams", "gain"] = Field(
        "ngrams",
        description="ngrams: the pieces that share most come together; gain: those from which the base gains"
        " most for each other",
    )
    match_candidates: int = Field(
        3,
        gt=0,
        description="of match_by gain: pieces that the base tries before each, of those that share most",
    )

    @field_validator("match_pieces")
    @classmethod
    def halved(cls, value):
        if value & (value - 1):
            raise ValueError(
                f"{value} is no power of two, and pieces are brought together by twos; use 2, 4, 8"
            )
        return value


def candidates(shared: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(earlier, later): the numbers of pieces, int64 [k], of the pairs that are worth trying: for each piece
    the ``most`` earlier ones that share most n-grams with it, of those that share any.  Of equals the nearest
    comes first."""
    pairs = [
        (earlier, later)
        for later in range(len(shared))
        for earlier in sorted(range(later), key=lambda number: (-shared[number, later], -number))[:most]
        if shared[earlier, later] > 0
    ]
    earlier, later = np.array(pairs, np.int64).reshape(-1, 2).T
    return earlier, later


def unrelated(shared: np.ndarray) -> np.ndarray:
    """Int64 [p]: for each piece, of those that share fewest n-grams with it, the one furthest away."""
    number = np.arange(len(shared))
    away = np.abs(number[:, None] - number)
    others = np.where(away > 0, shared, np.inf)
    return np.array([min(number, key=lambda n: (others[i, n], -away[i, n])) for i in number])


class Gains:
    """What the base gains for a piece from an earlier one, against unrelated text in its place."""

    def __init__(self, reader: gain.Reader, most: int, setting):
        """Raises BadInput if two pieces do not fit into the base's window."""
        self.reader, self.most = reader, most
        both = 2 * (setting.length // setting.options.match_pieces)
        if both > setting.base.window:
            raise BadInput(
                f"method_options.match_by: two pieces of a row hold {both} tokens together, and the base's"
                f" window {setting.base.window}; raise match_pieces, or set match_by=ngrams"
            )

    def __call__(self, pieces: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Float64 [p, p]: nats a token that piece j of ``pieces`` [p, size] gains from piece i < j; 0 where
        the base was not asked."""
        gains, (earlier, later) = np.zeros(shared.shape), candidates(shared, self.most)
        if len(later):
            size, asked = pieces.shape[1], np.unique(later)
            alone = np.zeros(len(pieces))
            before = pieces[unrelated(shared)[asked]]
            alone[asked] = self.reader.losses(np.hstack([before, pieces[asked]]), size)
            after = self.reader.losses(np.hstack([pieces[earlier], pieces[later]]), size)
            gains[earlier, later] = np.round(alone[later] - after, 4)
        return gains


class MatchedRows(Rows):
    def __init__(self, setting):
        super().__init__(setting)
        pieces = self.options.match_pieces
        self.together = max(1, self.target_length // self.length)
        if setting.packing != "cut":
            raise BadInput(
                f"data.packing: {setting.method} takes stretches of {self.together * self.length} tokens"
                " apart, whatever documents they are of; set data.packing=cut"
            )
        if self.length % pieces:
            raise BadInput(
                f"method_options.match_pieces: rows of {self.length} tokens (lengths.physical) cannot be cut"
                f" into {pieces} equal pieces; change one of them"
            )
        self.pieces = np.full(pieces, self.length // pieces, np.int64)
        self.waiting: list[tuple[np.ndarray, list[str]]] = []
        self.gain = None
        self.asks_base = self.options.match_by == "gain"
        if self.asks_base and setting.base is not None:
            self.gain = Gains(gain.Reader(setting.base), self.options.match_candidates, setting)

    def recorded(self):
        """Manifests from before the base was asked have the first two options alone."""
        found = self.options.model_dump(mode="json")
        return (
            found
            if self.options.match_by == "gain"
            else {**found, "match_by": None, "match_candidates": None}
        )

    def build(self, cursor, rng):
        self.waiting = self.waiting or self.matched(cursor, rng)
        if not self.waiting:
            return None
        text, documents = self.waiting.pop(0)
        return self.row(text, plans.skipwise(self.pieces, 0, self.target_length, rng), documents)

    def matched(self, cursor, rng: np.random.Generator) -> list[tuple[np.ndarray, list[str]]]:
        """(ids [length], ids of the documents) of the rows that the next stretch makes; none at the end of
        the corpus.
        """
        count, size = len(self.pieces), int(self.pieces[0])
        taken = [cursor.take(size) for _ in range(self.together * count)]
        if taken[-1] is None:
            return []
        stretch = np.stack([ids for ids, _ in taken])
        found = matching.groups(stretch, count, self.options.match_tokens, rng, self.gain)
        return [
            (
                np.concatenate([taken[number][0] for number in group]),
                list(dict.fromkeys(name for number in group for name in taken[number][1])),
            )
            for group in found
        ]


@register
class PoseMatched(Method):
    name = "pose_matched"
    summary = (
        "pose_sharp, whose rows are pieces of text that repeat something of each other, from all over L"
        " tokens"
    )
    Options = MatchOptions
    Rows = MatchedRows
    rope = "yarn"
    sharpening = 1.0
