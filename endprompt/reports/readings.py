"""What a comparison says, in one line a method: how far it finds keys, the one that reaches furthest first.

    python -m endprompt.reports.readings runs/tiny

Writes what ``endprompt.reports.compare`` writes, with the methods in that order.
"""

import argparse
import sys
from pathlib import Path

from endprompt import BadInput, methods
from endprompt.reports import compare

FOUND = 50.0  # percent of keys at a length from which on it counts as reached


def reach(cells: dict[int, dict]) -> int | None:
    """The greatest length in tokens up to which FOUND percent of the keys are found at every length asked;
    None: not even at the least.  cells: {length: {"mean": percent}}."""
    reached = None
    for length in sorted(cells):
        if cells[length]["mean"] < FOUND:
            break
        reached = length
    return reached


def ordered(found: dict[str, dict]) -> dict[str, dict]:
    """``found``, of ``compare.summary``, by keys over all lengths, most first."""

    def mean(name: str) -> float:
        cells = found[name]["passkey"]
        return sum(cell["mean"] for cell in cells.values()) / max(1, len(cells))

    return {name: found[name] for name in sorted(found, key=mean, reverse=True)}


def reading(cells: dict[int, dict], trained: bool) -> str:
    """One line of what keys found by length say."""
    if not cells:
        return "not asked for keys"
    least, most, reached = min(cells), max(cells), reach(cells)
    if reached is None:
        return f"finds few keys even at {least} tokens"
    if reached == most:
        said = f"finds keys at every length, {most} tokens being {most / least:g} times {least}"
    elif reached == least:
        said = f"finds keys at {least} tokens and not at {sorted(cells)[1]}"
    else:
        said = f"finds keys up to {reached} tokens, {reached / least:g} times {least}"
    return said if trained else f"{said}; nothing was trained"


def lines(found: dict[str, dict]) -> str:
    """A line a method: its keys found in percent by length, and what they say."""
    lengths = sorted({length for row in found.values() for length in row["passkey"]})
    width = max(map(len, found))
    head = "  ".join(f"{length:>5}" for length in lengths)
    made = [f"{'keys found, %':{width}}  {head}"]
    for name, row in ordered(found).items():
        cells = row["passkey"]
        shown = (f"{cells[length]['mean']:5.0f}" if length in cells else "    -" for length in lengths)
        told = reading(cells, methods.METHODS[name].trained)
        made.append(f"{name:{width}}  {'  '.join(shown)}   {told}")
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="DIR/<recipe> of the runs")
    parser.add_argument("--title", default=None)
    arguments = parser.parse_args()
    try:
        compare.compare([arguments.folder], None, arguments.title, ordered)
    except BadInput as error:
        print(f"readings: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"\n{lines(compare.summary([arguments.folder]))}")


if __name__ == "__main__":
    main()
