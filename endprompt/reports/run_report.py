"""One HTML page about runs, whole in itself: what was trained, how fast, what the rows covered, what it
scores, and in what the runs differ.  No model is run here, and no file but the page is written.
"""

import datetime
import statistics
from pathlib import Path
from typing import Any

from endprompt import BadInput, __version__, storage
from endprompt.evaluation import distance_figures, results
from endprompt.evaluation.results import Results
from endprompt.recipe import task_names
from endprompt.reports import run_data, run_figures
from endprompt.reports.run_data import Run

TEMPLATE = Path(__file__).with_name("run_report.html")
MARK = '<meta name="generator" content="endprompt report">'
PAGE_BYTES = 2**28
TASKS_DRAWN = 24  # by length; all are in the table


def write(folders: list[Path], out: Path) -> None:
    """Raises BadInput on what is no run's folder, and on an ``out`` that is another file or cannot be
    written."""
    _check(out)
    text = page(run_data.read(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise BadInput(f"--out: {out} cannot be written ({error.strerror}); choose another file") from None


def _check(out: Path) -> None:
    """Raises BadInput if ``out`` is there and no report: it would be lost."""
    try:
        if out.is_dir() or (out.exists() and MARK not in storage.read_text(out, PAGE_BYTES)):
            raise BadInput(f"--out: {out} is there already and is no report; choose another file")
    except (OSError, ValueError) as error:
        raise BadInput(f"--out: {out} cannot be written ({error}); choose another file") from None


def page(runs: list[Run]) -> str:
    """The page of ``runs``."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(storage.read_text(TEMPLATE, PAGE_BYTES))
    colour = run_figures.colours(list(models(runs)))
    return template.render(
        mark=jinja2.utils.markupsafe.Markup(MARK),
        title=", ".join(run.label for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        made=datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        version=__version__,
        runs=[_about(run, colour[run.label]) for run in runs],
        colour=colour,
        losses=_losses(runs, colour),
        speed=_over_steps(runs, colour, SPEED),
        coverage=_coverage(runs, colour),
        scores=_scores(runs, colour),
        grids=_grids(runs),
        settings=_settings(runs),
        versions=_versions(runs),
    )


def models(runs: list[Run]) -> dict[str, Results | None]:
    """{what it is called: its results} of each run's own model, and of others that were scored in a run's
    folder."""
    found: dict[str, Results | None] = {run.label: run.scored.get("") for run in runs}
    for run in runs:
        found |= {f"{run.label}: {name}": one for name, one in run.scored.items() if name}
    return found


# -- the runs ------------------------------------------------------------------------------------------------


def _about(run: Run, colour: str) -> dict[str, Any]:
    """What the first table says of a run."""
    _, speed = run.series("tokens_per_second")
    _, memory = run.series("peak_memory_gib")
    settings = run.settings
    lengths = [settings.get(f"lengths.{key}") for key in ("physical", "target")]
    last = run.history[-1] if run.history else {}
    return {
        "label": run.label,
        "folder": str(run.folder),
        "colour": colour,
        "cells": [
            ("state", run.state.get("state") or "scored"),
            ("base", Path(str(settings.get("model.name_or_path", "-"))).name),
            ("method", settings.get("method", "-")),
            ("rows and window", " → ".join(map(_count, lengths)) if any(lengths) else "-"),
            ("steps", _count(run.summary.get("steps") or last.get("step"))),
            ("tokens", _count(run.summary.get("tokens"))),
            ("text loss", _decimal(last.get("text_loss"), 4)),
            ("prompt loss", _decimal(last.get("end_prompt_loss"), 4)),
            ("tokens/s", _count(round(statistics.median(speed)) if speed else None)),
            ("peak memory", f"{max(memory):.2f} GiB" if memory else "-"),
            ("time", _time(run.summary.get("seconds"))),
            ("ranks", _count(run.summary.get("world_size"))),
        ],
    }


def _count(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "-"


def _decimal(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if type(value) in (int, float) else "-"


def _time(seconds: Any) -> str:
    if type(seconds) not in (int, float):
        return "-"
    minutes = seconds / 60
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.1f} h"
    )


LOSSES = {
    "text_loss": "text, nats a token",
    "end_prompt_loss": "end prompt, nats a token",
    "grad_norm": "norm of the gradient",
}
SPEED = {
    "tokens_per_second": "tokens a second, all ranks",
    "peak_memory_gib": "peak memory of the first rank, GiB",
    "mfu": "share of the peak FLOP/s that is reached",
}


def _over_steps(runs: list[Run], colour: dict[str, str], keys: dict[str, str]) -> str | None:
    panels = {}
    for key, heading in keys.items():
        lines = {run.label: run.series(key) for run in runs}
        if lines := {label: line for label, line in lines.items() if line[0]}:
            panels[heading] = lines
    return run_figures.over_steps(panels, colour) if panels else None


def _losses(runs: list[Run], colour: dict[str, str]) -> str | None:
    return _over_steps(runs, colour, LOSSES)


def _coverage(runs: list[Run], colour: dict[str, str]) -> dict[str, Any] | None:
    there = {run.label: run.covered for run in runs if run.covered}
    if not there:
        return None
    notes = [
        f"{label}: {one.rows:,} rows counted{'' if one.of_all else ', the first of more'}"
        for label, one in there.items()
    ]
    return {"picture": run_figures.covered(there, colour), "notes": "; ".join(notes)}


# -- scores --------------------------------------------------------------------------------------------------


def _order(task: str) -> tuple[int, str]:
    return (task_names.TASKS.index(task) if task in task_names.TASKS else len(task_names.TASKS)), task


def _scores(runs: list[Run], colour: dict[str, str]) -> dict[str, Any] | None:
    """Pictures by length, and a table of every score with its interval."""
    scored = {label: one for label, one in models(runs).items() if one}
    pairs = sorted(
        {pair for one in scored.values() for pair in one.found},
        key=lambda pair: (*_order(pair[0]), pair[1] or 0),
    )
    if not pairs:
        return None
    pictures: list[tuple[str, str]] = []
    for task in dict.fromkeys(task for task, _ in pairs):
        lines = {
            label: {
                length: file["scores"]
                for (name, length), file in one.found.items()
                if name == task and length
            }
            for label, one in scored.items()
        }
        if len({length for cells in lines.values() for length in cells}) > 1 and len(pictures) < TASKS_DRAWN:
            drawn = {label: cells for label, cells in lines.items() if cells}
            pictures.append((task, run_figures.by_length(task, drawn, colour)))
    rows = [
        (
            task,
            f"{length:,}" if length else "-",
            [_score(task, one.found.get((task, length))) for one in scored.values()],
        )
        for task, length in pairs
    ]
    return {"pictures": pictures, "labels": list(scored), "rows": rows, "notes": _left_out(scored)}


def _left_out(scored: dict[str, Results]) -> list[str]:
    """What the scores do not show, and which do not stand side by side."""
    unlike = (results.other_words(scored, task) for task in ("perplexity", task_names.FAR_GAIN))
    return [said for said in unlike if said] + [
        f"{label}: {one.older} results of another model in {one.folder} left out"
        for label, one in scored.items()
        if one.older
    ]


def _score(task: str, file: dict | None) -> dict[str, Any] | None:
    if file is None:
        return None
    digits = {"perplexity": 3, task_names.FAR_GAIN: 4}.get(task, 1)
    score, low, high = (f"{file['scores'][key]:.{digits}f}" for key in ("score", "low", "high"))
    return {"score": score, "interval": f"{low} to {high}", "samples": file["scores"]["samples"]}


def _grids(runs: list[Run]) -> list[tuple[str, str]]:
    """(heading, picture) of keys found by length and depth, and by distance."""
    found = []
    scored = {label: one for label, one in models(runs).items() if one}
    for task in run_figures.GRIDS:
        alike: dict[tuple, dict[str, list[dict]]] = {}  # panels share their depths
        for label, one in scored.items():
            rows = [one.found[task, length] for length in one.lengths(task)]
            cells = [results.cells(row["scores"], "depth", "correct", "total") for row in rows]
            if rows and all(cells):
                depths = tuple(sorted({cell["depth"] for some in cells for cell in some}))
                alike.setdefault(depths, {})[label] = rows
        for named in alike.values():
            found.append((f"{task}: keys found by length and depth", run_figures.grid(named)))
    far = {
        label: drawn
        for label, one in scored.items()
        for length in one.lengths(task_names.DISTANCE)
        if (drawn := _far(one.found[task_names.DISTANCE, length]["scores"]))
    }
    if far:
        found.append(("distance: keys found by how far away they are", run_figures.far(far)))
    return found


def _far(scores: dict) -> run_figures.Far | None:
    """Keys found by the distance from question to key, and the spans of distances that no row showed; None
    if a result of distance is not whole.

    The spans count from a query to a key, so a point stands in the middle of those between its questions and
    keys: the extra distance is less by what is behind a key in the haystack.
    """
    cells, coverage = results.cells(scores, "distance", "score", "low", "high"), scores.get("coverage")
    spans = (coverage.get("gap") if isinstance(coverage, dict) else None) or []
    placed = all(results.span(cell.get("between")) for cell in cells)
    if not placed or not isinstance(spans, list) or not all(map(results.span, spans)):
        spans = []  # what is not known is not shaded
    found = {
        (distance_figures.middle(cell) if placed else cell["distance"]): {
            "mean": cell["score"],
            "low": cell["low"],
            "high": cell["high"],
        }
        for cell in cells
    }
    return (found, [(low, high) for low, high in spans]) if found else None


# -- settings and versions -----------------------------------------------------------------------------------


def _table(runs: list[Run], values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {"key", "cells", "differs"} of what each run says of each key."""
    keys = dict.fromkeys(key for one in values for key in one)
    rows = []
    for key in keys:
        cells = [run_data.shown(one[key]) if key in one else "-" for one in values]
        rows.append({"key": key, "cells": cells, "differs": len(set(cells)) > 1})
    return rows


def _settings(runs: list[Run]) -> dict[str, Any] | None:
    rows = _table(runs, [run.settings for run in runs])
    if not rows:
        return None
    return {"differing": [row for row in rows if row["differs"]], "all": rows}


def _versions(runs: list[Run]) -> list[dict[str, Any]]:
    found = [{key: value or "not installed" for key, value in run.versions.items()} for run in runs]
    return _table(runs, found)
