"""Keys asked for from afar: a short haystack at positions 0..n-1, and the question at positions n + d on, for
a list of extra distances d, all else equal.

It tells knowing far positions apart from telling many keys apart: nothing stands in between, so a model that
finds a key at d = 0 and not further on does not know the distance.  One reading of the haystack serves every
distance and every key, so positions up to the target length are tested at the price of a short prompt.
"""

import random
from dataclasses import dataclass

import numpy as np

from endprompt.evaluation import haystacks, intervals, named_keys, passkey, prefix
from endprompt.evaluation.haystacks import Design
from endprompt.positions import coverage

POINTS = 13  # distances by default, the first and the last that there can be among them


@dataclass(frozen=True)
class Stretch:
    """haystack: its tokens, n; target: positions that there are, L; room: tokens of a question and its
    answer."""

    haystack: int
    target: int
    room: int

    @property
    def most(self) -> int:
        """The greatest extra distance at which question and answer end before L."""
        return self.target - self.haystack - self.room

    def distances(self, chosen: list[int] | None) -> list[int]:
        """Extra distances, in order: ``chosen``, or POINTS of them over all that there are.  Raises
        ValueError if none fits, or a chosen one does not."""
        if self.most < 0:
            raise ValueError(
                f"eval.distance_haystack: a haystack of {self.haystack} tokens with its question and answer"
                f" ({self.room}) does not fit into lengths.target {self.target}; lower it to"
                f" {self.target - self.room}"
            )
        if chosen is None:
            return sorted({round(self.most * point / (POINTS - 1)) for point in range(POINTS)})
        if (far := max(chosen)) > self.most:
            raise ValueError(
                f"eval.distances: at {far} a haystack of {self.haystack} tokens, the question and its answer"
                f" ({self.room}) end beyond lengths.target {self.target}; {self.most} is the greatest that"
                " fits"
            )
        return sorted(set(chosen))


def drawn(design: Design, number: int) -> list[haystacks.Key]:
    """The names and keys of haystack ``number``, at depths drawn for it."""
    rng = random.Random(f"distance/{design.seed}/{number}")
    return haystacks.draw(rng, haystacks.scattered(design, rng))


class Distance:
    """The task, a haystack a piece (``progress.Pieces``).

    counts: int64 [L] how many query-key pairs of the model's training rows stand at each distance; None: not
    known, and then said in ``reason``.
    """

    noun = "haystacks"

    def __init__(self, reader: prefix.Reader, tokenizer, design: Design, stretch: Stretch, chosen: list[int]):
        self.reader, self.tokenizer, self.design = reader, tokenizer, design
        self.stretch, self.chosen, self.total = stretch, chosen, design.haystacks
        self.counts: np.ndarray | None = None
        self.reason = ""

    def rows(self, number: int) -> list[dict]:
        # All keys are told, so that questions about the last haystack are as hard as those before.
        keys, wanted = drawn(self.design, number), self.design.asked(number)
        found = haystacks.within(self.tokenizer, self.stretch.haystack, keys, self.design.chat)
        pairs = [(asked, distance) for distance in self.chosen for asked in found.asked[:wanted]]
        questions = [
            prefix.Question(asked.ids, asked.answer, len(found.ids) + distance) for asked, distance in pairs
        ]
        replies = self.reader.ask(found.ids, questions)
        self.reader.forget()
        made = []
        for (asked, distance), question, reply in zip(pairs, questions, replies, strict=True):
            # What predicts the first digit stands before it, what predicts the last before that.
            first = question.start + len(asked.ids) - 1 + asked.digits.index(True)
            last = question.start + len(asked.ids) + len(asked.answer) - 2
            made.append(
                {
                    "distance": distance,
                    **named_keys.about(asked, number),
                    **named_keys.answered(reply, asked, self.tokenizer),
                    "between": [first - asked.last, last - asked.first],
                }
            )
        return made

    def summary(self, rows: list[dict]) -> dict:
        """{"metric", "score" in percent over all distances, "low", "high", "samples": questions a distance,
        "haystacks", "haystack": tokens, "nats", ..., "cells": one a distance, "coverage"}.

        The interval of the whole is a bootstrap over questions, of which each counts with all its distances.
        """
        by_question: dict[tuple, list[float]] = {}
        for row in rows:
            found = by_question.setdefault((row["haystack"], row["name"]), [])
            found.append(100.0 * passkey.correct(row["pred"], row["key"]))
        means = [sum(found) / len(found) for found in by_question.values()]
        low, high = intervals.bootstrap(means)
        return {
            "metric": "keys found",
            "score": sum(means) / len(means),
            "low": low,
            "high": high,
            "samples": len(means),
            "haystacks": self.total,
            "haystack": self.stretch.haystack,
            **named_keys.loss(rows),
            "cells": [self._cell(distance, rows) for distance in self.chosen],
            "coverage": self._coverage(),
        }

    def _cell(self, distance: int, rows: list[dict]) -> dict:
        """One distance: "between" are the least and the greatest distance, in positions, from what predicts a
        key's digits to the digits in the haystack; "supervised" the share of them that training rows show,
        and "pairs" how many query-key pairs show each, on average."""
        here = [row for row in rows if row["distance"] == distance]
        hits = sum(passkey.correct(row["pred"], row["key"]) for row in here)
        low, high = intervals.wilson(hits, len(here))
        least, most = min(row["between"][0] for row in here), max(row["between"][1] for row in here)
        known = None if self.counts is None else self.counts[least : most + 1]
        return {
            "distance": distance,
            "between": [least, most],
            "correct": hits,
            "total": len(here),
            "score": 100 * hits / len(here),
            "low": 100 * low,
            "high": 100 * high,
            **named_keys.loss(here),
            "supervised": None if known is None else float(np.mean(known > 0)),
            "pairs": None if known is None else float(np.mean(known)),
        }

    def _coverage(self) -> dict:
        """{"source", "supervised": spans of distances that training rows show, "gap": those that they do not,
        both ends included}; both null where they are not known."""
        if self.counts is None:
            return {"source": self.reason, "supervised": None, "gap": None}
        seen = coverage.counted(self.counts)
        spans = {"supervised": seen, "gap": coverage.gap(seen, self.stretch.target)}
        return {"source": self.reason, **{name: [list(span) for span in spans[name]] for name in spans}}

    def predictions(self, rows: list[dict]) -> list[dict]:
        return rows
