"""The tables of endprompt.reports.distances: arms in rows, distances or lengths in columns."""

import re
from collections.abc import Callable
from pathlib import Path

from endprompt import BadInput
from endprompt.evaluation import distance_figures, intervals
from endprompt.positions import coverage
from endprompt.recipe import task_names
from endprompt.reports import findings_tables
from endprompt.reports.markdown import grid

FOUND = ("score", "low", "high"), (0.0, 100.0)
NATS = ("nats", "nats_low", "nats_high"), (0.0, float("inf"))
GAIN = ("score", "low", "high"), (float("-inf"), float("inf"))
PERPLEXITY = ("score", "low", "high"), (0.0, float("inf"))

READING = (
    "Keys found in % by extra distance, with 95 % interval (Wilson for one seed or equal ones; of two seeds\n"
    "one that holds both seeds' own; from three on Student's t); `*`: training rows showed most of these\n"
    "distances."
)
# Positions from a distance that was asked for to the nearest that training rows showed.
STEPS = ((0, "shown"), (1024, "up to 1024"), (4096, "up to 4096"), (16384, "up to 16384"))
BEYOND = "further"
BRIEF = 5  # distances of a short table: the first, and the last ones, where arms part


def pooled(cells: list[dict], keys: tuple[str, str, str], limits: tuple[float, float]) -> dict:
    """The value ``keys[0]`` of each seed's cell as one, {"mean", "low", "high", "seeds", "interval"}; the
    others are the ends of a cell's own interval, which stands for one seed.

    Of two seeds, Student's interval is 25 times as wide as they are apart from their mean, and says nothing:
    there the interval holds both seeds' own.
    """
    value, low, high = keys
    alone = cells[0][low], cells[0][high]
    found = intervals.over_seeds([cell[value] for cell in cells], alone, *limits)
    if len(cells) == 2 and found["interval"] == "t":
        ends = min(cell[low] for cell in cells), max(cell[high] for cell in cells)
        found |= {"low": ends[0], "high": ends[1], "interval": "both"}
    return found


def by_length(arm: list[dict], task: str) -> dict[int, list[dict]]:
    """{length: "scores" of each seed} of one task; arm: a run's entry a seed."""
    found: dict[int, list[dict]] = {}
    for seed in arm:
        for pair, scores in seed["results"].items():
            name, _, length = pair.rpartition(":")
            if name == task and length.isdigit():
                found.setdefault(int(length), []).append(scores)
    return dict(sorted(found.items()))


def joined(seeds: list[dict]) -> dict:
    """The "scores" of distance of several seeds as one, their means with intervals.  Raises BadInput if they
    are of other distances.
    """
    rows = [{cell["distance"]: cell for cell in seed["cells"]} for seed in seeds]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise BadInput("distance: the seeds of an arm were scored at different distances; score them alike")
    cells = []
    for place, first in rows[0].items():
        each = [row[place] for row in rows]
        found, nats = pooled(each, *FOUND), pooled(each, *NATS)
        spans = [cell["between"] for cell in each]
        shares = [cell["supervised"] for cell in each if cell["supervised"] is not None]
        numbered = [cell["numbered"] for cell in each if cell.get("numbered") is not None]
        cells.append(
            first
            | {"score": found["mean"], "low": found["low"], "high": found["high"]}
            | {"nats": nats["mean"], "nats_low": nats["low"], "nats_high": nats["high"]}
            | {"between": [min(low for low, _ in spans), max(high for _, high in spans)]}
            | {"total": sum(cell["total"] for cell in each), "seeds": len(each)}
            | {"supervised": sum(shares) / len(shares) if shares else None}
            | {"numbered": sum(numbered) / len(numbered) if numbered else None}
        )
    whole = pooled(seeds, *FOUND)
    return seeds[0] | {
        "score": whole["mean"],
        "low": whole["low"],
        "high": whole["high"],
        "cells": cells,
        "coverage": _shown_by_any(seeds),
    }


def _shown_by_any(seeds: list[dict]) -> dict:
    """The distances that the rows of one seed or another showed, as ``distance`` writes them."""
    known = [seed["coverage"]["supervised"] for seed in seeds if seed["coverage"]["supervised"] is not None]
    if not known:
        return seeds[0]["coverage"]
    spans = coverage.union((low, high) for seed in known for low, high in seed)
    return {"supervised": spans, "gap": coverage.gap(spans, seeds[0]["length"])}


def lengths(arms: dict[str, list[dict]], task: str, shown: Callable[[list[dict]], str]) -> str | None:
    """A table of ``task``: a row an arm, a column a length; None if no arm has results."""
    found = {name: by_length(arm, task) for name, arm in arms.items()}
    columns = sorted({length for cells in found.values() for length in cells})
    rows = [
        (name, [shown(cells[length]) if length in cells else "not run" for length in columns])
        for name, cells in found.items()
        if cells
    ]
    return grid("arm", [str(length) for length in columns], rows) if rows else None


def _percent(cell: dict) -> str:
    return f"{cell['mean']:.0f} [{cell['low']:.0f}, {cell['high']:.0f}]"


def keys(seeds: list[dict]) -> str:
    return f"{_percent(pooled(seeds, *FOUND))}, {pooled(seeds, *NATS)['mean']:.2f} nats"


def gain(seeds: list[dict]) -> str:
    cell = pooled(seeds, *GAIN)
    return f"{cell['mean']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"


def perplexity(seeds: list[dict]) -> str:
    cell = pooled(seeds, *PERPLEXITY)
    return f"{cell['mean']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def distances(shown: dict[str, dict]) -> str:
    """Keys found, their loss, and answers with a number, by distance: a row an arm of {name: ``joined``}."""
    places = sorted({cell["distance"] for scores in shown.values() for cell in scores["cells"]})
    found, nats, numbered = [], [], []
    for name, scores in shown.items():
        cells = {cell["distance"]: cell for cell in scores["cells"]}
        there = [cells.get(place) for place in places]
        marked = [
            "not run" if cell is None else f"{_percent({**cell, 'mean': cell['score']})}{_mark(cell)}"
            for cell in there
        ]
        found.append((name, marked))
        nats.append((name, ["not run" if cell is None else f"{cell['nats']:.2f}" for cell in there]))
        shares = [(cell or {}).get("numbered") for cell in there]
        if any(share is not None for share in shares):
            numbered.append((name, ["-" if share is None else f"{share:.0f}" for share in shares]))
    heads = [f"+{place}" for place in places]
    parts = [READING, grid("arm", heads, found), "Loss of the key in nats a token.", grid("arm", heads, nats)]
    if numbered:
        parts += ["Answers that hold a digit, in %.", grid("arm", heads, numbered)]
    return "\n\n".join(parts)


def brief(shown: dict[str, dict]) -> str:
    """Keys found over all distances and at BRIEF of them, for a page that has little room."""
    places = sorted({cell["distance"] for scores in shown.values() for cell in scores["cells"]})
    places = sorted({places[0], *places[-(BRIEF - 1) :]})
    rows = []
    for name, scores in shown.items():
        cells = {cell["distance"]: cell for cell in scores["cells"]}
        there = [cells.get(place) for place in places]
        percents = [
            "not run" if cell is None else _percent({**cell, "mean": cell["score"]}) for cell in there
        ]
        rows.append((name, [_percent({**scores, "mean": scores["score"]}), *percents]))
    return grid("keys found, %", ["all distances", *(f"+{place:,}" for place in places)], rows)


def prompt_loss(arms: dict[str, list[dict]]) -> str | None:
    """The end prompt's loss in nats a token over the steps, mean over seeds; None if no arm has one."""
    found = {
        name: [run["training"]["end_prompt_loss"] for run in arm if run.get("training")]
        for name, arm in arms.items()
    }
    found = {name: seeds for name, seeds in found.items() if any(seeds)}
    steps = sorted({int(step) for seeds in found.values() for seed in seeds for step in seed})
    # The first steps, between which most happens, and each of twice the number after them.
    columns = [step for step in steps if step in (steps[0], steps[-1]) or step & (step - 1) == 0]
    rows = []
    for name, seeds in found.items():
        losses = [[seed[str(step)] for seed in seeds if str(step) in seed] for step in columns]
        rows.append((name, [f"{sum(some) / len(some):.3f}" if some else "-" for some in losses]))
    return grid("arm, step", [str(step) for step in columns], rows) if rows else None


def _mark(cell: dict) -> str:
    return " `*`" if cell["supervised"] is not None and cell["supervised"] > 0.5 else ""


def from_shown(cell: dict, spans: list[list[int]]) -> float:
    """Positions from the middle of a cell's distances to the nearest of ``spans``; 0 within one."""
    at = distance_figures.middle(cell)
    return min((max(low - at, at - high, 0.0) for low, high in spans), default=float("inf"))


def filled_in(shown: dict[str, dict], controls: dict[str, str]) -> str | None:
    """What each arm has over its control by how far a distance is from the nearest that its rows showed: the
    difference of keys found in percentage points, and of the loss, as means over the distances of a step.
    None if there is nothing to compare.  controls: {arm: another of ``shown``}.
    """
    names = [name for _, name in STEPS] + [BEYOND]
    rows = []
    for name, scores in shown.items():
        spans, control = scores["coverage"]["supervised"], controls.get(name)
        if control not in shown or not spans:
            continue
        plain = {cell["distance"]: cell for cell in shown[control]["cells"]}
        steps: dict[str, list[tuple[float, float]]] = {}
        for cell in scores["cells"]:
            if (other := plain.get(cell["distance"])) is None:
                continue
            away = from_shown(cell, spans)
            step = next((label for most, label in STEPS if away <= most), BEYOND)
            steps.setdefault(step, []).append((cell["score"] - other["score"], cell["nats"] - other["nats"]))
        if steps:
            row = [_difference(steps.get(step, [])) for step in names]
            rows.append((f"{name}, less {control}", row))
    return grid("arm", names, rows) if rows else None


def paired(arms: dict[str, list[dict]], target: int, controls: dict[str, str]) -> str | None:
    """What each arm has over its control, paired by seed, over all distances and at BRIEF of them: points of
    keys found and nats of their loss with Student's intervals.  Of arms that share at least three seeds with
    their control (of two, that interval says nothing) and of the distances that all of these were asked at;
    None if there are none.
    """
    scored = {name: _by_seed(arm, target) for name, arm in arms.items()}
    pairs = {
        (name, control): seeds
        for name, control in controls.items()
        if len(seeds := sorted(scored[name].keys() & scored[control].keys())) >= 3
    }
    asked = [set(scored[name][seed]) for pair, seeds in pairs.items() for name in pair for seed in seeds]
    places = sorted(set.intersection(*asked)) if asked else []
    if not places:
        return None
    shown = sorted({places[0], *places[-(BRIEF - 1) :]})
    rows = []
    for (name, control), seeds in pairs.items():
        row = []
        for chosen in (places, *([place] for place in shown)):
            changes = [
                [
                    sum(
                        scored[name][seed][place][part] - scored[control][seed][place][part]
                        for place in chosen
                    )
                    / len(chosen)
                    for seed in seeds
                ]
                for part in (0, 1)
            ]
            row.append(f"{_signed(changes[0], '{:+.0f}')} points, {_signed(changes[1], '{:+.2f}')} nats")
        rows.append((f"{name}, less {control} ({len(seeds)} seeds)", row))
    return grid("arm", ["all distances", *(f"+{place:,}" for place in shown)], rows)


def _by_seed(arm: list[dict], target: int) -> dict[str, dict[int, tuple[float, float]]]:
    """{seed's folder: {distance: (keys found in %, loss in nats)}} of the runs whose folder names a seed."""
    found = {}
    for run in arm:
        seed = next((part for part in Path(run["run"]).parts if re.fullmatch(r"seed\d+", part)), None)
        scores = run["results"].get(f"{task_names.DISTANCE}:{target}")
        if seed and scores:
            found[seed] = {cell["distance"]: (cell["score"], cell["nats"]) for cell in scores["cells"]}
    return found


def _signed(values: list[float], form: str) -> str:
    """The mean of one value a seed with Student's interval; alone where all agree."""
    return findings_tables.cell(intervals.over_seeds(values, (values[0], values[0]), float("-inf")), form)


def _difference(pairs: list[tuple[float, float]]) -> str:
    if not pairs:
        return "-"
    found, nats = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{found:+.0f} points, {nats:+.2f} nats ({len(pairs)})"


def inside(arms: dict[str, list[dict]]) -> str | None:
    """What training cost and left within the window: tokens, the text loss of the last logged steps, and
    tasks of short text."""
    found = {_task(pair) for arm in arms.values() for run in arm for pair in run["results"]}
    tasks = sorted(found & set(task_names.SHORT_TEXT))
    rows = []
    for name, arm in arms.items():
        trained = [run["training"] for run in arm if run.get("training")]
        scores = {
            task: [scores for run in arm for pair, scores in run["results"].items() if _task(pair) == task]
            for task in tasks
        }
        if not trained and not any(scores.values()):
            continue
        losses = [record["text_loss"] for record in trained if record["text_loss"] is not None]
        cells = [_percent(pooled(found, *FOUND)) if found else "not run" for found in scores.values()]
        rows.append(
            (
                name,
                [
                    str(trained[0]["tokens"]) if trained else "0",
                    f"{sum(losses) / len(losses):.3f}" if losses else "-",
                    *cells,
                ],
            )
        )
    return grid("arm", ["tokens trained on", "text loss at the end", *tasks], rows) if rows else None


def _task(pair: str) -> str:
    return pair.rpartition(":")[0]
