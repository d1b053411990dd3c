"""Markdown that is written by commands: tables, and their places in pages that people write."""

import re


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
