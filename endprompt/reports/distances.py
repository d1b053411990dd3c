"""The tasks distance, named_keys and far_gain of several runs side by side: tables, and one picture of keys
found over distance with an arm in each column.

    python -m endprompt.reports.distances RUN [RUN ...] --out DIR

RUN is a run's folder, OUT/<recipe>/<method>, or NAME=RUN; runs under one name are an arm's seeds, and their
mean is shown with Student's interval over them.  Without names, an arm is called by as much of its folder as
tells the runs apart.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.evaluation import distance_figures, intervals, results
from endprompt.positions import coverage
from endprompt.recipe import task_names
from endprompt.reports.markdown import grid
from endprompt.runs import provenance

Arms = dict[str, list[results.Results]]


def named(given: list[str]) -> dict[str, list[Path]]:
    """{name of an arm: its runs} of NAME=RUN and RUN arguments.  Raises BadInput if a folder is no run's."""
    pairs: list[tuple[str, Path]] = []
    for text in given:
        name, equals, path = text.partition("=")
        pairs.append((name, Path(path)) if equals and not Path(text).exists() else ("", Path(text)))
    for _, folder in pairs:
        if not (folder / "eval").is_dir():
            raise BadInput(f"{folder} holds no results; name a run's folder that was evaluated, or NAME=RUN")
    short = _told_apart([folder.absolute() for name, folder in pairs if not name])
    arms: dict[str, list[Path]] = {}
    for name, folder in pairs:
        arms.setdefault(name or short[folder.absolute()], []).append(folder)
    return arms


def _told_apart(folders: list[Path]) -> dict[Path, str]:
    """As many last parts of each folder's path as tell all of ``folders`` apart."""
    most = max((len(folder.parts) for folder in folders), default=0)
    for count in range(1, most + 1):
        names = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len(set(names.values())) == len(names):
            return names
    return {folder: str(folder) for folder in folders}


def _scores(arm: list[results.Results], task: str) -> dict[int, list[dict]]:
    """{length: "scores" of each seed} of one task."""
    found: dict[int, list[dict]] = {}
    for seed in arm:
        for (name, length), result in seed.found.items():
            if name == task and length is not None:
                found.setdefault(length, []).append(result["scores"])
    return dict(sorted(found.items()))


def pooled(cells: list[dict], keys: tuple[str, str, str], limits: tuple[float, float]) -> dict:
    """The value ``keys[0]`` of each seed's cell as one, {"mean", "low", "high", "seeds", "interval"}; the
    others are the ends of a cell's own interval, which stands for one seed."""
    value, low, high = keys
    alone = cells[0][low], cells[0][high]
    return intervals.over_seeds([cell[value] for cell in cells], alone, *limits)


FOUND = ("score", "low", "high"), (0.0, 100.0)
NATS = ("nats", "nats_low", "nats_high"), (0.0, float("inf"))
GAIN = ("score", "low", "high"), (float("-inf"), float("inf"))


def joined(seeds: list[dict]) -> dict:
    """The "scores" of distance of several seeds as one.  Raises BadInput if they are of other distances."""
    rows = [{cell["distance"]: cell for cell in seed["cells"]} for seed in seeds]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise BadInput("distance: the seeds of an arm were scored at different distances; score them alike")
    cells = []
    for place, first in rows[0].items():
        each = [row[place] for row in rows]
        found, nats = pooled(each, *FOUND), pooled(each, *NATS)
        spans = [cell["between"] for cell in each]
        shares = [cell["supervised"] for cell in each if cell["supervised"] is not None]
        cells.append(
            first
            | {"score": found["mean"], "low": found["low"], "high": found["high"]}
            | {"nats": nats["mean"], "nats_low": nats["low"], "nats_high": nats["high"]}
            | {"between": [min(low for low, _ in spans), max(high for _, high in spans)]}
            | {"total": sum(cell["total"] for cell in each), "seeds": len(each)}
            | {"supervised": sum(shares) / len(shares) if shares else None}
        )
    return seeds[0] | {"cells": cells, "coverage": _shown_by_any(seeds)}


def _shown_by_any(seeds: list[dict]) -> dict:
    """The distances that the rows of one seed or another showed, as ``distance`` writes them."""
    known = [seed["coverage"]["supervised"] for seed in seeds if seed["coverage"]["supervised"] is not None]
    if not known:
        return seeds[0]["coverage"]
    spans = coverage.union((low, high) for seed in known for low, high in seed)
    return {"supervised": spans, "gap": coverage.gap(spans, seeds[0]["length"])}


def _by_length(arms: Arms, task: str, shown: Callable[[list[dict]], str]) -> str | None:
    """A table of ``task``: a row an arm, a column a length; None if no arm has results."""
    found = {name: _scores(arm, task) for name, arm in arms.items()}
    lengths = sorted({length for cells in found.values() for length in cells})
    rows = [
        (name, [shown(cells[length]) if length in cells else "not run" for length in lengths])
        for name, cells in found.items()
        if cells
    ]
    return grid("arm", [str(length) for length in lengths], rows) if rows else None


def _percent(cell: dict) -> str:
    return f"{cell['mean']:.0f} [{cell['low']:.0f}, {cell['high']:.0f}]"


def _keys(seeds: list[dict]) -> str:
    return f"{_percent(pooled(seeds, *FOUND))}, {pooled(seeds, *NATS)['mean']:.2f} nats"


def _gain(seeds: list[dict]) -> str:
    cell = pooled(seeds, *GAIN)
    return f"{cell['mean']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"


def _distance_tables(shown: dict[str, dict]) -> list[str]:
    """Keys found, and their loss, by distance: a row an arm."""
    places = sorted({cell["distance"] for scores in shown.values() for cell in scores["cells"]})
    found, nats = [], []
    for name, scores in shown.items():
        cells = {cell["distance"]: cell for cell in scores["cells"]}
        there = [cells.get(place) for place in places]
        marked = [
            "not run" if cell is None else f"{_percent({**cell, 'mean': cell['score']})}{_mark(cell)}"
            for cell in there
        ]
        found.append((name, marked))
        nats.append((name, ["not run" if cell is None else f"{cell['nats']:.2f}" for cell in there]))
    heads = [f"+{place}" for place in places]
    return [
        "Keys found in % by extra distance, with 95 % interval (Student's t over seeds, Wilson for one seed"
        " or equal ones); `*`: training rows showed most of these distances.",
        grid("arm", heads, found),
        "Loss of the key in nats a token.",
        grid("arm", heads, nats),
    ]


def _mark(cell: dict) -> str:
    return " `*`" if cell["supervised"] is not None and cell["supervised"] > 0.5 else ""


def report(given: list[str], out: Path, title: str | None = None) -> None:
    """Writes distances.md, distances.json and a distances-<target>.png for each target length into ``out``.
    Raises BadInput if a folder is no run's, or no run has results of these tasks.
    """
    runs = named(given)
    arms: Arms = {name: [results.read_run(folder) for folder in folders] for name, folders in runs.items()}
    by_arm = {name: _scores(arm, task_names.DISTANCE) for name, arm in arms.items()}
    blocks, pictures = [], {}
    for target in sorted({length for cells in by_arm.values() for length in cells}):
        shown = {name: joined(cells[target]) for name, cells in by_arm.items() if target in cells}
        pictures[target] = shown
        blocks += [f"## Distance, up to {target}", *_distance_tables(shown)]
    for task, heading, form in (
        (task_names.NAMED_KEYS, "Named keys by length: found in %, and loss", _keys),
        (task_names.FAR_GAIN, "Gain from far context by length, nats a token", _gain),
    ):
        if made := _by_length(arms, task, form):
            blocks += [f"## {heading}", made]
    if not blocks:
        tasks = ", ".join(task_names.PIECEWISE)
        raise BadInput(f"none of the runs has results of {tasks}; add them to eval.tasks and evaluate")
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title or 'Distances'}", *blocks]) + "\n"
    storage.write_atomically(out / "distances.md", text.encode())
    content = {
        "arms": {
            name: [
                {
                    "run": str(folder),
                    "results": {
                        f"{task}:{length}": file["scores"]
                        for (task, length), file in read.found.items()
                        if task in task_names.PIECEWISE
                    },
                }
                for folder, read in zip(runs[name], arms[name], strict=True)
            ]
            for name in arms
        }
    }
    storage.write_json(out / "distances.json", {**content, **provenance.stamp()})
    for target, shown in pictures.items():
        distance_figures.panels(shown, out / f"distances-{target}.png", title)
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="OUT/<recipe>/<method>, or NAME=OUT/<recipe>/<method>")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--title", default=None)
    arguments = parser.parse_args(argv)
    try:
        report(arguments.run, arguments.out, arguments.title)
    except BadInput as error:
        print(f"distances: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
