r"""What a laboratory of runs says: tables, differences with intervals, curves of the losses, keys found by
length and by distance, and every number as JSON.

    python -m endprompt.reports.findings runs/lab --out docs/findings
    python -m endprompt.reports.findings docs/findings/findings.json --out docs/findings --page \
        docs/findings.md --page README.md
    # new runs beside old numbers
    python -m endprompt.reports.findings docs/findings/findings.json runs/lab --out docs/findings

A folder holds a folder a setting, and in it OUT of recipes/compare.sh: <setting>/seed<k>/<recipe>/<method>.
The setting ``plain`` is the one that the others are told apart from.  A findings.json that was written before
gives the same tables and pictures without the runs.  Of several sources, what a later one says of a setting
and method stands in the place of what an earlier one says.  A page takes those tables that it has a place
for, between ``<!-- name -->`` and ``<!-- /name -->``.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from endprompt import BadInput, methods, storage
from endprompt.evaluation import figures, intervals, passkey, results
from endprompt.positions import coverage, plans
from endprompt.reports import compare, findings_questions, findings_tables, markdown
from endprompt.reports.findings_questions import PLAIN
from endprompt.rows import shards
from endprompt.runs import provenance

CROWDED = 8  # lines in a picture; more are drawn in a panel for each method
LOSSES = {
    "text_loss": "text loss",
    "end_prompt_loss": "end-prompt loss",
    "end_prompt_later_loss": "end-prompt loss, first token left out",
}


def settings(runs: Path) -> dict[str, list[Path]]:
    """{setting: folders of its recipe, one a seed} below ``runs``, ``plain`` first.  Raises BadInput if there
    is no plain one, or the folders of a setting do not belong together.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(
        {path.parent.parent for path in runs.glob("*/seed*/*/*/eval") if path.parent.name in methods.METHODS}
    ):
        found.setdefault(folder.parent.parent.name, []).append(folder)
    if PLAIN not in found:
        raise BadInput(
            f"{runs} holds no evaluated run {PLAIN}/seed<k>/<recipe>/<method>; make them with recipes/lab.sh"
            " first"
        )
    for folders in found.values():
        compare.check(folders)
    return {PLAIN: found.pop(PLAIN), **found}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    return {
        key: value
        for name, inner in tree.items()
        for key, value in (
            _flat(inner, f"{prefix}{name}.").items() if isinstance(inner, dict) else [(prefix + name, inner)]
        )
    }


def difference(plain: dict, other: dict) -> str:
    """The keys of ``other``'s setting that are not as in ``plain``'s, as ``--set`` takes them."""
    plain, other = _flat(plain), _flat(other)
    return ", ".join(
        f"{key}={json.dumps(value)}" for key, value in sorted(other.items()) if plain.get(key) != value
    )


def spread(values: list[float]) -> dict:
    """{"mean", "low", "high", "seeds"}: the mean and the least and greatest of one value a seed."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "seeds": len(values)}


def losses(runs: list[Path]) -> dict[str, dict[int, dict]]:
    """{those of LOSSES that were logged: {step: ``spread`` over the seeds' ``runs``}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        record = results.training(run) or {}
        for entry in record.get("history", []):
            for key in LOSSES:
                if key in entry:
                    found.setdefault(key, {}).setdefault(entry["step"], []).append(entry[key])
    return {
        key: {step: spread(values) for step, values in sorted(by_step.items())}
        for key, by_step in found.items()
    }


def _over_seeds(counts: list[tuple[int, int]]) -> dict:
    """The cell of ``intervals.over_seeds`` of (keys found, keys) a seed, in percent."""
    low, high = intervals.wilson(*counts[0])
    return intervals.over_seeds(
        [100 * hits / total for hits, total in counts], (100 * low, 100 * high), 0.0, 100.0
    )


def never_seen(run: Path, length: int) -> list[tuple[int, int]] | None:
    """Spans of distances below ``length`` that no row of ``run``'s shards has; None where there are no
    shards.
    """
    if not (run / "shards" / shards.MANIFEST).is_file():
        return None
    manifest = shards.read_manifest(run / "shards")
    rows = (plans.segments(row) for row in shards.position_ids(run / "shards", manifest))
    return coverage.gap(
        coverage.counted(coverage.pair_counts(rows, manifest["target_length"])[:length]), length
    )


def keys(runs: list[Path], task: str) -> dict:
    """Keys found over the seeds' ``runs`` by ``task``: {"mean": cell over all lengths, "distances":
    {distance: cell} at the greatest length, "never": the spans of distances that the first seed's rows lack,
    "seen", "unseen": {length: cell} of keys at distances that they have or lack}.

    A key at depth d of a text of n tokens is about (1 - d) x n before the question.
    """
    seeds = [rows for run in runs if (rows := results.read_run(run).rows(task))]
    if not seeds:
        return {}
    lengths = sorted({row["scores"]["length"] for rows in seeds for row in rows})
    never = never_seen(runs[0], lengths[-1])
    found: dict[str, Any] = {
        "mean": _over_seeds(
            [
                (
                    sum(cell["correct"] for row in rows for cell in row["scores"]["cells"]),
                    sum(cell["total"] for row in rows for cell in row["scores"]["cells"]),
                )
                for rows in seeds
            ]
        ),
        "distances": {},
        "never": never,
        "seen": {},
        "unseen": {},
    }
    for length in lengths:
        cells: dict[int, list[tuple[int, int]]] = {}
        parted: dict[str, list[tuple[int, int]]] = {"seen": [], "unseen": []}
        for row in (row for rows in seeds for row in rows if row["scores"]["length"] == length):
            here = {
                round((1 - cell["depth"]) * (length - 1)): (cell["correct"], cell["total"])
                for cell in row["scores"]["cells"]
            }
            for distance, count in here.items():
                cells.setdefault(distance, []).append(count)
            for kind, wanted in (("seen", False), ("unseen", True)):
                chosen = [
                    count
                    for distance, count in here.items()
                    if any(low <= distance <= high for low, high in never or []) is wanted
                ]
                if never is not None and chosen:
                    hits, keys = zip(*chosen, strict=True)
                    parted[kind].append((sum(hits), sum(keys)))
        if length == lengths[-1]:
            found["distances"] = {distance: _over_seeds(counts) for distance, counts in sorted(cells.items())}
        for kind, counts in parted.items():
            if counts:
                found[kind][length] = _over_seeds(counts)
    return found


def single(folders: list[Path], method: str) -> dict:
    """What ``method``'s results say a seed: {"values": {task: {length: {seed's folder: score}}}, "samples":
    {task: {length: keys a seed}}, "commits", "devices"}.
    """
    found: dict[str, dict[int, dict[str, float]]] = {task: {} for task in compare.TASKS}
    samples: dict[str, dict[int, int]] = {task: {} for task in passkey.TASKS}
    commits, devices = set(), set()
    for folder in folders:
        scored = results.read_run(folder / method)
        for task in compare.TASKS:
            for row in scored.rows(task):
                found[task].setdefault(row["scores"]["length"], {})[folder.parent.name] = row["scores"][
                    "score"
                ]
                if task in passkey.TASKS:
                    samples[task][row["scores"]["length"]] = row["scores"]["samples"]
                commits.add(str(row.get("commit"))[:12])
                devices.add(str(row.get("device")))
    return {"values": found, "samples": samples, "commits": sorted(commits), "devices": sorted(devices)}


def _plain(found: dict[str, dict], method: str) -> dict:
    """The plain setting of ``method``, of those ``found`` by method; where it was not run, that of another
    with the method's own defaults.
    """
    if method in found:
        return found[method]
    options = methods.METHODS[method].Options().model_dump(mode="json")
    return {**next(filter(None, found.values()), {}), "method_options": options}


def collect(runs: Path) -> list[dict]:
    """An entry {"setting", "method", "name", "different", "scores": of ``compare.summary``, what ``single``
    says, "passkey", "multikey": of ``keys``, "losses"} for each setting and method below ``runs``.
    """
    entries, plain = [], {}
    for setting, folders in settings(runs).items():
        for method, scores in compare.summary(folders).items():
            own = [folder / method for folder in folders if (folder / method / "eval").is_dir()]
            recipe = compare.run_setting(own[0] / "recipe.yaml")[1]
            if setting == PLAIN:
                plain[method] = recipe
            different = difference(_plain(plain, method), recipe) if setting != PLAIN else ""
            if setting.endswith(findings_tables.BY_POSITION):
                different = ", ".join(filter(None, [different, findings_tables.EXPORTED]))
            entries.append(
                {
                    "setting": setting,
                    "method": method,
                    "name": f"{method}, {setting}" if different else method,
                    "different": different,
                    "scores": scores,
                    **single(folders, method),
                    **{task: keys(own, task) for task in passkey.TASKS},
                    "losses": losses(own),
                }
            )
    return entries


def read(path: Path) -> dict:
    """{"entries", ...} of a findings.json, as ``collect`` made them.  Raises BadInput if it is none."""

    def numbers(tree: dict) -> dict:
        return {int(key) if key.isdigit() else key: value for key, value in tree.items()}

    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=numbers)
        if not all(isinstance(entry["values"], dict) for entry in record["entries"]):
            raise ValueError("an entry has no values")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise BadInput(
            f"{path} is no findings.json ({reason}); make it from the runs of recipes/lab.sh"
        ) from None
    return record


def draw(entries: list[dict], out: Path, title: str | None = None) -> list[Path]:
    """Writes losses.png, keys.png, multikey.png, distances.png, distances-multikey.png, prompts.png,
    sharpened.png, scalings.png, steps.png and neighbours.png, those of which there is something to show.
    """
    apart = findings_questions.NEIGHBOURS  # which have a picture of their own
    plain = [entry for entry in entries if entry["setting"] == PLAIN and entry["method"] not in apart]
    drawn: list[Path] = []

    def picture(name: str) -> Path:
        drawn.append(out / f"{name}.png")
        return drawn[-1]

    def lines(name: str, chosen: list[dict], task: str = "passkey") -> None:
        if found := {entry["name"]: entry["scores"][task] for entry in chosen if entry["scores"][task]}:
            figures.lines(found, picture(name), title, f"{task}: keys found in %")

    panels = {
        heading: {entry["name"]: entry["losses"][key] for entry in plain if key in entry["losses"]}
        for key, heading in LOSSES.items()
    }
    if panels := {heading: series for heading, series in panels.items() if series}:
        figures.curves(panels, picture("losses"), title)
    lines("keys", plain)
    lines("multikey", plain, "multikey")
    for task, name in (("passkey", "distances"), ("multikey", "distances-multikey")):
        if found := {
            entry["name"]: (entry[task]["distances"], entry[task]["never"] or [])
            for entry in plain
            if entry[task]
        }:
            figures.distances(found, picture(name), title)
    for name, wanted in (
        ("prompts", findings_tables.prompts(entries)),
        ("sharpened", findings_tables.sharpened(entries)),
        ("scalings", findings_questions.scalings(entries)),
        ("steps", findings_questions.settings(entries, findings_questions.STEPS.fullmatch)),
        ("neighbours", findings_questions.neighbours(entries)),
    ):
        chosen = [entry for entry in wanted if entry["scores"]["passkey"]]
        if not chosen or (name != "neighbours" and all(entry["setting"] == PLAIN for entry in chosen)):
            continue
        if len(chosen) <= CROWDED:
            lines(name, chosen)
            continue
        by_method: dict[str, dict[str, dict]] = {}
        for entry in chosen:
            by_method.setdefault(entry["method"], {})[entry["setting"]] = entry["scores"]["passkey"]
        figures.panels(by_method, picture(name), title, "passkey: keys found in %")
    return drawn


def joined(sources: list[Path]) -> list[dict]:
    """The entries of ``sources`` (folders of runs, or findings.json files), later ones in the place of
    earlier ones.

    They are ordered by setting, the plain one first, then by the method table.  Raises BadInput if a source
    holds no runs, or if one was tested on another number of keys at a length than a source before it.
    """
    found: dict[tuple[str, str], dict] = {}
    before: dict[tuple[str, int], int] = {}
    order = list(methods.METHODS)
    for source in sources:
        here: dict[tuple[str, int], int] = {}
        for entry in read(source)["entries"] if source.is_file() else collect(source):
            counted = {
                (task, length): number
                for task, lengths in entry["samples"].items()
                for length, number in lengths.items()
            }
            if differing := [key for key, number in counted.items() if before.get(key, number) != number]:
                task, length = differing[0]
                raise BadInput(
                    f"{source}: {entry['name']} was tested on {counted[task, length]} keys ({task} at"
                    f" {length}), and what it would stand beside on {before[task, length]}; evaluate it alike"
                )
            here |= counted
            found[entry["setting"], entry["method"]] = entry
        before |= here
    settings = list(dict.fromkeys(setting for setting, _ in found))
    return sorted(
        found.values(),
        key=lambda entry: (
            entry["setting"] != PLAIN,
            settings.index(entry["setting"]),
            order.index(entry["method"]) if entry["method"] in order else len(order),
        ),
    )


def findings(sources: list[Path], out: Path, title: str | None = None, pages: Sequence[Path] = ()) -> None:
    """Writes findings.json, tables.md and the pictures of ``draw`` into ``out``, the tables into ``pages``
    too, and prints them.

    sources: as ``joined`` takes them; findings.json is left alone where it is the only source.  Raises
    BadInput if one holds no runs, or a page is missing or has a place twice.
    """
    titles = [read(source).get("title") for source in sources if source.is_file()]
    entries, title = joined(sources), title or next(iter(titles), None)
    made = any(source.is_dir() for source in sources)
    tables = findings_tables.tables(entries) | findings_questions.tables(entries)
    texts = {page: markdown.filled(page, tables) for page in pages}
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"<!-- {name} -->\n{table}\n<!-- /{name} -->" for name, table in tables.items())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    if made:
        storage.write_json(out / "findings.json", {"title": title, "entries": entries, **provenance.stamp()})
    for page, content in texts.items():
        page.write_text(content, encoding="utf-8")
    written = [
        out / "tables.md",
        *([out / "findings.json"] if made else []),
        *draw(entries, out, title),
        *pages,
    ]
    print("\n".join([text, "", *map(str, written)]))


def command(report: Callable[[list[Path], Path, str | None, list[Path]], None], description: str) -> None:
    """The command line of ``report``, which takes sources, the folder to write into, a title and pages; what
    it refuses is said in one line, with exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="+",
        help="the folder of the settings' folders, or a JSON file that was written before",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--title", default=None)
    parser.add_argument(
        "--page",
        type=Path,
        action="append",
        default=[],
        metavar="PAGE",
        help="a page whose tables are replaced",
    )
    arguments = parser.parse_args()
    try:
        report(arguments.source, arguments.out, arguments.title, arguments.page)
    except BadInput as error:
        print(f"{report.__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main() -> None:
    command(findings, __doc__ or "")


if __name__ == "__main__":
    main()
