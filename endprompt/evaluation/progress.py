"""A pair of task and length that is scored piece by piece, a haystack or a text at a time: what is done is
kept, so that a killed evaluation goes on within the pair.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tqdm import tqdm


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


class Kept:
    """The rows of pieces that are done, in the file ``path``: the question in its first line, a piece in each
    other.  A file that answers another question is begun anew."""

    def __init__(self, path: Path, question: dict):
        self.path, self.rows = path, list[list[dict]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(question, sort_keys=True) + "\n"
        whole = self._read(head)
        if whole is None:
            path.write_text(head, encoding="utf-8")
        else:
            os.truncate(path, whole)  # a kill may have left half a line

    def _read(self, head: str) -> int | None:
        """How many bytes of the file are whole lines that count; None: none is."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        if not lines or lines[0] != head.encode():
            return None
        size = len(lines[0])
        for line in lines[1:]:
            try:
                rows = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                rows = None
            if not isinstance(rows, list):
                break
            self.rows.append(rows)
            size += len(line)
        return size

    def add(self, rows: list[dict]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(rows)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


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
