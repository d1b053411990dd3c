"""Rows of pieces that repeat something of each other, from all over a stretch of L tokens."""

import numpy as np
from pydantic import Field, field_validator

from endprompt import BadInput
from endprompt.methods import matching
from endprompt.methods.base import Method, Options, Rows, register
from endprompt.positions import plans


class MatchOptions(Options):
    match_pieces: int = Field(4, ge=2, description="pieces of a row, a power of two")
    match_tokens: int = Field(5, gt=0, description="as many in a row that two pieces share count once")

    @field_validator("match_pieces")
    @classmethod
    def halved(cls, value):
        if value & (value - 1):
            raise ValueError(
                f"{value} is no power of two, and pieces are brought together by twos; use 2, 4, 8"
            )
        return value


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
        found = matching.groups(stretch, count, self.options.match_tokens, rng)
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
