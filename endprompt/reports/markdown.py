"""Markdown that is written by commands: tables, and their places in pages that people write."""

import re
from pathlib import Path

from endprompt import BadInput


def grid(corner: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table."""
    return "\n".join(
        [
            f"| {' | '.join([corner, *columns])} |",
            "|" + "---|" * (len(columns) + 1),
            *(f"| {' | '.join([name, *cells])} |" for name, cells in rows),
        ]
    )


def replaced(page: str, name: str, block: str) -> str:
    """``page`` with what stands between ``<!-- name -->`` and ``<!-- /name -->`` replaced.  Raises ValueError
    if they are not there, once each.
    """
    made, count = re.subn(
        rf"(<!-- {name} -->\n)(?:.*?\n)??(<!-- /{name} -->)",
        lambda match: f"{match[1]}{block}\n{match[2]}",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"the page has {count} blocks {name}; one is wanted")
    return made


def filled(page: Path, found: dict[str, str]) -> str:
    """The text of ``page`` with those of the tables ``found`` that it has a place for.  Raises BadInput if it
    cannot be read, has no place, or one twice or without an end.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--page {page}: it cannot be read ({getattr(error, 'strerror', None) or error}); name a page of"
            " this repository"
        ) from None
    places = [name for name in found if f"<!-- {name} -->" in text or f"<!-- /{name} -->" in text]
    try:
        for name in places:
            text = replaced(text, name, found[name])
    except ValueError as error:
        raise BadInput(f"--page {page}: {error}") from None
    if not places:
        first = next(iter(found))
        raise BadInput(
            f"--page {page}: it has no place for a table; write <!-- {first} --> and <!-- /{first} -->, or"
            f" another of {', '.join(found)}"
        )
    return text
