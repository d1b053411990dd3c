"""A pair of task and length that is scored piece by piece, a haystack or a text at a time: what is done is
kept, so that a killed evaluation goes on within the pair.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from endprompt.storage import Kept

__all__ = ["Kept", "Pieces", "Unfinished", "collect", "path_of"]


class Pieces(Protocol):
    """What a task of this kind is."""

    noun: str  # what a piece is, in the plural
    total: int

    def rows(self, number: int) -> list[dict]:
        """What piece ``number`` gave, as JSON."""

    def summary(self, rows: list[dict]) -> dict:
        """What the result file holds under "scores", of the rows of all pieces."""

    def predictions(self, rows: list[dict]) -> list[dict]:
        """The rows as they are kept beside the result; none: nothing is kept."""


class Unfinished(Exception):
    """The budget is over; ``args``: how far the pair has come."""


def path_of(result: Path) -> Path:
    """Where the pieces of the result file ``result`` are kept until it is written."""
    return result.with_suffix(".part.jsonl")


def collect(pieces: Pieces, kept: Kept, left: Callable[[], float], name: str) -> list[dict]:
    """The rows of all ``pieces``, those in ``kept`` not made again.

    left: seconds that may still be used.  name: of the pair, for the bar with the time left, which a log does
    not get.  Raises Unfinished when no other piece should be begun.
    """
    longest, total = 0.0, pieces.total
    bar = tqdm(
        total=total,
        initial=len(kept.rows),
        desc=name,
        unit=f" {pieces.noun}",
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for number in range(len(kept.rows), total):
            if not left() > max(longest, 0.0):
                raise Unfinished(f"{number} of {total} {pieces.noun}")
            started = time.monotonic()
            kept.add(pieces.rows(number))
            if math.isfinite(left()):
                longest = max(longest, time.monotonic() - started)
            bar.update()
    return [row for rows in kept.rows for row in rows]
