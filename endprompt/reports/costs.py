"""A picture of what training costs: the steps that endprompt/planning/efficiency.py measured, beside the
paper's Figure 4.

    python -m endprompt.reports.costs FILE --out PICTURE
"""

import argparse
import json
import sys
from pathlib import Path

from endprompt import BadInput, methods
from endprompt.evaluation import figures
from endprompt.planning.entries import best
from endprompt.reports import paper


def draw(results: dict, path: Path) -> None:
    """The paper's two bars (Figure 4), time and memory, ours beside them, at the longest target that both
    endprompt and full_length were measured at.
    """
    entries = results["entries"]
    names = [
        name
        for name in methods.METHODS
        if any(entry["method"] == name and entry["fits"] for entry in entries)
    ]
    shared = [
        target
        for target in sorted({entry["target"] for entry in entries})
        if all(best(entries, name, target) for name in names)
    ]
    if not shared:
        raise BadInput("costs: no target length was measured for all methods that the file holds")
    target, printed = shared[-1], paper.tables()["figure_4_64k"].printed
    chosen = {name: entry for name in names if (entry := best(entries, name, target))}
    hours = [1e9 / chosen[name]["tokens_per_second"] / 3600 for name in names]
    memory = [chosen[name]["memory_above_states_bytes"] / 2**30 for name in names]

    def of_paper(column: str) -> list[float | None]:
        return [float(printed[name][column]) if name in printed else None for name in names]

    paper_s = "paper (8B)"
    panels = [
        (f"time, target {target}", "hours for 1e9 tokens", names, {"ours": hours}),
        ("time, target 64K", "hours, 8 x A800", names, {paper_s: of_paper("hours")}),
        (f"memory above the states, target {target}", "GiB", names, {"ours": memory}),
        ("peak memory, target 64K", "GB a GPU", names, {paper_s: of_paper("memory_gb")}),
    ]
    figures.costs(
        panels,
        path,
        f"What training costs: shape {results['shape']} on {results['device'][:40]}, and the paper's"
        " Figure 4",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.reports.costs", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what endprompt.planning.efficiency wrote")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="PICTURE", help="default: FILE, ending in .png"
    )
    arguments = parser.parse_args()
    try:
        draw(json.loads(arguments.file.read_text()), arguments.out or arguments.file.with_suffix(".png"))
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"endprompt: costs: {arguments.file}: cannot be read: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
