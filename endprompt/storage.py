"""Files that are whole or not there, and JSON that anyone may have written."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from endprompt.errors import BadInput

JSON_BYTES = 2**28  # the names and checksums of a million corpus files


def write_atomically(path: Path, data: bytes) -> None:
    """A reader, or a run after a kill, sees either the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def output_folder(out: Path) -> None:
    """Makes the folder ``out`` of a command's --out.  Raises BadInput if there can be none to write into."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise BadInput(f"--out: {out} cannot be written into ({error.strerror}); choose another") from None


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """What stands in a manifest or the like.  Raises OSError, or ValueError if it is not JSON in UTF-8, no
    regular file, or larger than JSON_BYTES.
    """
    try:
        return json.loads(read_text(path, JSON_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_text(path: Path, most: int) -> str:
    """The text of a file.  Raises OSError or ValueError where it is not UTF-8, no regular file (a
    pipe would be waited for), or above ``most`` bytes.

    The mark of UTF-8 (BOM) that editors on Windows put first is no part of it.
    """
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return data.decode("utf-8-sig")


class Kept:
    """What pieces of a long work gave, a list each, in the file ``path``: the question in its first line, a
    piece in each other, so that a killed run goes on.  A file that answers another question is begun anew."""

    def __init__(self, path: Path, question: dict):
        self.path, self.rows = path, list[list]()
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

    def add(self, rows: list) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(rows)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
