"""Reading a corpus: local jsonl / parquet / txt (plain, .gz, .zst; files or folders) or a dataset on the hub,
streamed.
"""

import contextlib
import gzip
import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endprompt import BadInput
from endprompt.recipe.schema import Recipe
from endprompt.rows.ledger import PIECE, Ledger, Source

KINDS = (".jsonl", ".json", ".parquet", ".txt")
PACKED = (".gz", ".zst")
LONGEST = 2**30  # characters of a document or line; a packed file can hold an endless one
DATASET_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
HELD_OUT = (
    "test",
    "validation",
    "train",
)  # the split of a folder that held-out text is read from: the first of these that is there


@dataclass(frozen=True)
class File:
    """A file of the corpus: its number in reading order, its place below what data.corpus names, and what
    document ids call it.

    ``inside`` and ``name`` are printable; neither depends on where the corpus lies.
    """

    path: Path
    index: int
    inside: str
    name: str


def printable(text: str) -> str:
    """``text`` with what cannot be printed escaped, as are the bytes of a file's name that is no UTF-8, and
    backslashes.
    """

    def shown(character: str) -> str:
        if 0xDC80 <= ord(character) <= 0xDCFF:  # what os.fsdecode makes of a byte
            return f"\\x{ord(character) - 0xDC00:02x}"
        return (
            character
            if character.isprintable() and character != "\\"
            else character.encode("unicode_escape").decode()
        )

    return "".join(map(shown, text))


def _told_apart(found: list[File]) -> list[File]:
    """``found`` under names: a file's own, and as much of its place before it as no other file's name is the
    same.
    """
    places = [Path(os.path.abspath(file.path)).parts for file in found]

    def name(number: int, level: int) -> str:
        depth = found[number].inside.count("/") + level
        return (
            found[number].inside.rpartition("/")[2]
            if level == 0
            else printable("/".join(places[number][-depth:]))
        )

    levels, clashing = [0] * len(found), list(range(len(found)))
    while clashing:
        names, users = [name(number, level) for number, level in enumerate(levels)], defaultdict(set)
        for place, called in zip(places, names, strict=True):
            users[called].add(place)
        clashing = [
            number
            for number in range(len(found))
            if len(users[names[number]]) > 1 and levels[number] < len(places[number])
        ]
        for number in clashing:
            levels[number] += 1
    return [replace(file, name=called) for file, called in zip(found, names, strict=True)]


def kind(path: Path) -> str | None:
    """ ".jsonl", ".parquet" or ".txt" of a supported file, None of any other."""
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if suffix not in KINDS or (suffix == ".parquet" and path.suffix in PACKED):
        return None
    return ".jsonl" if suffix == ".json" else suffix


def local_files(
    recipe: Recipe, splits: tuple[str, ...] | None = None, key: str = "data.corpus"
) -> list[File] | None:
    """The corpus' files in reading order; None if ``data.corpus`` is a hub id.  A file that is named is read;
    of a folder, what ``datasets.load_dataset`` takes for the first split of ``splits`` (``data.split``) that
    is there.

    Raises BadInput beginning with ``key`` if there is nothing to read.
    """
    import re

    corpus = recipe.data.corpus if isinstance(recipe.data.corpus, list) else [recipe.data.corpus]
    if not corpus:
        raise BadInput(f"{key} is empty; name a folder, files, or a dataset of the hub")
    found: list[File] = []
    for entry in corpus:
        path = recipe.path(entry) if entry else None
        if path is None:
            if len(corpus) == 1 and re.fullmatch(DATASET_ID, entry) and kind(Path(entry)) is None:
                return None
            raise BadInput(
                f"{key}: there is no file or folder {entry!r}; give an existing path, or the id of a dataset"
                " on the hub"
            )
        inside = _inside(path, splits or (recipe.data.split,), key) if path.is_dir() else [path]
        if not inside:
            raise BadInput(
                f"{key}: the folder {path} holds no {', '.join(KINDS)} file (nor one packed as .gz or .zst)"
            )
        for file in inside:
            if kind(file) is None:
                raise BadInput(
                    f"{key}: {file} is of no known kind; use {', '.join(KINDS)}, plain or packed as .gz or"
                    " .zst"
                )
            if not file.is_file():
                why = "a link to nothing" if not file.exists() else "no regular file, and would be waited for"
                raise BadInput(f"{key}: {file} is {why}; put a file there, or remove it")
            place = file.relative_to(path).as_posix() if path.is_dir() else file.name
            found.append(File(file, len(found), printable(place), ""))
    return _told_apart(found)


def _inside(folder: Path, splits: tuple[str, ...], key: str) -> list[Path]:
    """What ``folder`` and its folders hold of a split under the names of corpus files, sorted; what is passed
    over is named on stderr.
    """
    from endprompt.rows import corpus_folder

    def refuse(error: OSError):
        raise BadInput(f"{key}: {error.filename} cannot be read ({error.strerror}); mend its permissions")

    paths = {}
    for place, folders, files in os.walk(folder, onerror=refuse):
        for path in (Path(place, name) for name in folders):
            if path.is_symlink():
                print(
                    f"warning: {key}: {path} is a link to a folder and passed over; name the folder itself"
                    f" in {key}",
                    file=sys.stderr,
                )
        for path in (Path(place, name) for name in files):
            paths[path.relative_to(folder).as_posix()] = path
    chosen, left = corpus_folder.choose(
        folder, sorted(paths), lambda name: kind(paths[name]) is not None, splits, key
    )
    if left:
        print(printable(f"warning: {key}: of {folder}, not read: {left}"), file=sys.stderr)
    return sorted(paths[name] for name in chosen)


class _Zstd(io.RawIOBase):
    """The bytes in a .zst file of any number of frames.  zstandard's own reader takes a file that was cut
    short for a whole one.
    """

    def __init__(self, packed: io.RawIOBase):
        self._pieces, self._piece = self._decompressed(packed), memoryview(b"")

    @staticmethod
    def _decompressed(source: io.RawIOBase) -> Iterator[bytes]:
        import zstandard

        frame = None
        with io.BufferedReader(source, 2**17) as file:
            while packed := file.read(2**10):  # which stand for 32 MiB at most
                while packed:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                    yield frame.decompress(packed)
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the file ends in the middle of a zstd frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def open_text(path: Path, source: Source | None = None) -> io.TextIOBase:
    """A file as UTF-8 text, unpacked if its name ends in .gz or .zst, without the mark of UTF-8 (BOM) that
    may stand before it.

    source: what its bytes are read from, in place of ``path``.  What gzip, zstd and UTF-8 raise comes
    through. Raises BadInput for a pipe, a socket or a device.
    """
    if path.exists() and not path.is_dir() and not path.is_file():
        raise BadInput(f"{path} is no regular file, and would be waited for; put a file there")
    binary: gzip.GzipFile | io.BufferedReader
    if path.suffix == ".gz":
        binary = gzip.GzipFile(fileobj=io.BufferedReader(source, 2**17)) if source else gzip.GzipFile(path)
    elif path.suffix == ".zst":
        binary = io.BufferedReader(_Zstd(source or Source(path)))
    else:
        binary = io.BufferedReader(source or Source(path), 2**17)
    return io.TextIOWrapper(binary, encoding="utf-8-sig")


def _lines(file: io.TextIOBase, where: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise BadInput(
                f"{where} line {number} is longer than {LONGEST} characters; split it, or remove the file"
            )
        yield line


def json_lines(lines: Iterable[str], where: Path | str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, what stands in it) of every line that is not blank.  Raises BadInput naming a line
    of ``where`` that is no JSON.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"{where} line {number}: not JSON: {error}; a .jsonl file has one object a line"
            ) from None


def jsonl(path: Path, source: Source | None = None) -> Iterator[tuple[int, Any]]:
    """``json_lines`` of a file, plain or packed as .gz or .zst; ``source`` as in ``open_text``."""
    with open_text(path, source) as file:
        yield from json_lines(_lines(file, path), path)


def _text(row, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise BadInput(f"data.text_column: {where} has no {column!r}; it has {there}")
    if not isinstance(row[column], str):
        raise BadInput(
            f"{where}: {column!r} is {type(row[column]).__name__}, not text; mend or drop that row"
        )
    if len(row[column]) > LONGEST:
        raise BadInput(f"{where}: {column!r} is longer than {LONGEST} characters; split it")
    try:
        row[column].encode()
    except UnicodeEncodeError:  # JSON can escape one half of a UTF-16 pair; no tokenizer reads it
        raise BadInput(
            f"{where}: {column!r} holds half of a UTF-16 surrogate pair, which is no text; mend or drop"
            " that row"
        ) from None
    return row[column]


def _file_texts(path: Path, source: Source, column: str) -> Iterator[str]:
    if kind(path) == ".parquet":
        import pyarrow.parquet as pq

        while source.read(PIECE):  # it is not read from its start to its end below
            pass
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise BadInput(
                f"data.text_column: {path} has no {column!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        number = 0
        # So many rows at once as are some 256 MiB, if they are alike in size.
        packed = file.metadata.row_group
        largest = max(
            (
                packed(index).total_byte_size // max(1, packed(index).num_rows)
                for index in range(file.metadata.num_row_groups)
            ),
            default=0,
        )
        for batch in file.iter_batches(
            batch_size=max(1, min(256, 2**28 // max(1, largest))), columns=[column]
        ):
            for row in batch.to_pylist():
                number += 1
                yield _text(row, column, f"{path} row {number}")
    elif kind(path) == ".txt":
        pieces, length = [], 0
        with open_text(path, source) as file:
            while piece := file.read(PIECE):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise BadInput(f"data.corpus: {path} is longer than {LONGEST} characters; split it")
        yield "".join(pieces)
    else:
        for number, row in jsonl(path, source):
            yield _text(row, column, f"{path} line {number}")


def _dataset(recipe: Recipe) -> str:
    return recipe.data.corpus if isinstance(recipe.data.corpus, str) else recipe.data.corpus[0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def revision(recipe: Recipe) -> str | None:
    """The commit that the hub's dataset ``data.corpus`` is at now; None where the hub does not say."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # huggingface_hub's, httpx's and the socket's; reading it says why
        return HfApi().dataset_info(_dataset(recipe)).sha
    return None


def _streamed(recipe: Recipe, commit: str | None) -> Iterator[tuple[str, str]]:
    import datasets

    name, number = _dataset(recipe), -1
    pinned = {} if commit is None else {"revision": commit}
    try:
        stream = datasets.load_dataset(name, split=recipe.data.split, streaming=True, **pinned)
        for number, row in enumerate(stream):
            text = _text(row, recipe.data.text_column, f"{name} row {number}")
            if text.strip():
                yield f"{name}#{number}", text
    except BadInput:
        raise
    except Exception as error:  # of the network, of unpacking, and what datasets makes of them
        if number < 0:
            raise BadInput(
                f"data.corpus: {name!r} is no local path and cannot be streamed from the hub"
                f" ({_said(error)}); check the id, the network and data.split"
            ) from None
        raise BadInput(
            f"data.corpus: {name!r} cannot be read behind row {number} ({_said(error)}); the same command"
            " goes on from the last shard, unless a file of the dataset is damaged"
        ) from None


def documents(
    recipe: Recipe, files: list[File] | None, ledger: Ledger | None = None, commit: str | None = None
) -> Iterator[tuple[str, str]]:
    """(document id, text) in the corpus' own order; the id names the file and the number of the document in
    it.

    ledger: where it is noted what was read.  commit: of a dataset of the hub, the newest unless given.
    Documents without any text are passed over.  Raises BadInput naming file and line where something cannot
    be read.
    """
    column = recipe.data.text_column
    if files is None:
        yield from _streamed(recipe, commit)
        return
    for file in files:
        try:
            with Source(file.path) as source:
                for number, text in enumerate(_file_texts(file.path, source, column)):
                    if text.strip():
                        if ledger:
                            ledger.note(file, source)
                        yield f"{file.name}#{number}", text
                if ledger:
                    ledger.note(file, source)
        except BadInput:
            raise
        except Exception as error:  # gzip, zstd, Arrow and UTF-8 each raise their own
            raise BadInput(
                f"data.corpus: {file.path} cannot be read:"
                f" {str(error).splitlines()[0] if str(error) else type(error).__name__}; it may be damaged,"
                " or not be what its name says"
            ) from None
