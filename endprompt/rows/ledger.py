"""What was read of a corpus, byte by byte, so that a preparation that goes on reads the same text."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endprompt.rows.corpus import File

PIECE = 2**20


class Source(io.FileIO):
    """A file that is read from its start to its end: how many of its bytes were, and their SHA-256."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.count, self.sha256 = 0, hashlib.sha256()

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def readall(self) -> bytes:
        pieces = []
        while piece := self.read(PIECE):
            pieces.append(piece)
        return b"".join(pieces)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])


def _prefix_fault(path: Path, expected: dict[int, str]) -> bool:
    """Whether the first bytes of a file are other than ``expected``, {how many: their SHA-256}."""
    with Source(path) as source:
        for count, digest in sorted(expected.items()):
            while source.count < count and source.read(min(PIECE, count - source.count)):
                pass
            if source.count != count or source.sha256.hexdigest() != digest:
                return True
    return False


class Ledger:
    """What was read of a corpus: ``records``, [place, bytes, bytes that were read, their SHA-256] of each
    file, as far as ``settle`` was told.

    Documents are read ahead of the rows that are made of them.  What is recorded depends on the documents
    that were used alone, not on the number of workers, so that the same rows come with the same record.
    """

    def __init__(self, files: list[File] | None, records: list[list] | None = None):
        """records: those of a run that this one goes on from."""
        self.records = records or (
            None if files is None else [[file.inside, file.path.stat().st_size, 0, ""] for file in files]
        )
        self._given = 0
        self._changes: deque[tuple[int, int, int, str]] = deque()  # (documents given, file, bytes, SHA-256)

    def note(self, file: File, source: Source) -> None:
        """``source`` is ``file`` as far as the next document, or to its end."""
        if not self._changes or self._changes[-1][1:3] != (file.index, source.count):
            self._changes.append((self._given, file.index, source.count, source.sha256.hexdigest()))

    def follow(self, stream: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for document in stream:
            self._given += 1
            yield document

    def settle(self, used: int | None) -> None:
        """Records what was read for the first ``used`` documents of those followed, None for all there
        are.
        """
        while self._changes and (used is None or self._changes[0][0] < used):
            _, index, count, digest = self._changes.popleft()
            # A run that goes on reads again what was recorded.
            if self.records is not None and count > self.records[index][2]:
                self.records[index][2:] = [count, digest]


def are_records(value: Any) -> bool:
    """Whether ``value`` has the form of ``Ledger.records``."""
    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(record, list)
            and [*map(type, record)] == [str, int, int, str]
            and 0 <= record[2] <= record[1]
            for record in value
        )
    )


def changed(files: list[File], records: list[list], *others: list[list]) -> str:
    """What of ``files`` is not as ``records``, and ``others`` of the same corpus, say it was; "" if all
    is.
    """
    now = [[file.inside, file.path.stat().st_size] for file in files]
    then = [record[:2] for record in records]
    if now != then:
        sizes, before = ({name: size for name, size in pairs} for pairs in (now, then))
        faults = (
            [f"{name} is missing" for name in before if name not in sizes]
            + [f"{name} is new" for name in sizes if name not in before]
            + [
                f"{name} has {size} bytes in place of {before[name]}"
                for name, size in now
                if before.get(name, size) != size
            ]
        )
        faults = faults or ["its files are in another order, or more or fewer of one name"]
    else:
        faults = []
        for number, file in enumerate(files):
            digests: dict[int, set[str]] = defaultdict(set)
            for one in (records, *others):
                if one[number][2]:
                    digests[one[number][2]].add(one[number][3])
            if any(len(found) > 1 for found in digests.values()) or _prefix_fault(
                file.path, {count: min(found) for count, found in digests.items()}
            ):
                faults.append(f"{file.inside} holds other text of the same length")
    return ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
