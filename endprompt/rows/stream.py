"""The corpus as one stream of tokens, from which rows are taken."""

from collections.abc import Iterator

import numpy as np


class Cursor:
    """The corpus as one stream of tokens that remembers where it stands: (documents finished, tokens taken of
    the next).
    """

    def __init__(self, stream: Iterator[tuple[str, np.ndarray]], document: int, offset: int):
        self._stream, self.document, self.offset = stream, document, offset
        self._current: tuple[str, np.ndarray] | None = None

    def _load(self) -> tuple[str, np.ndarray] | None:
        if self._current is None:
            self._current = next(self._stream, None)
        return self._current

    def _advance(self, count: int, length: int) -> None:
        """length: tokens of the document that it stands in."""
        self.offset += count
        if self.offset >= length:
            self._current, self.document, self.offset = None, self.document + 1, 0

    def take(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The next ``count`` tokens and the ids of the documents they come from; None if the corpus ends
        before.
        """
        parts, names, missing = [], [], count
        while missing:
            if (current := self._load()) is None:
                return None
            name, ids = current
            part = ids[self.offset : self.offset + missing]
            parts.append(part)
            names.append(name)
            missing -= len(part)
            self._advance(len(part), len(ids))
        return np.concatenate(parts), names

    def take_document(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The first ``count`` tokens, or fewer, of the next document; the rest of it is passed over.  So is a
        document of one token, in which nothing is foretold.
        """
        while (current := self._load()) is not None:
            name, ids = current
            self._advance(len(ids), len(ids))
            if len(ids) > 1:
                return ids[:count], [name]
        return None
