"""The runs of a laboratory as entries, one for each setting and method, and as JSON that was written before.

A laboratory's folder holds a folder a setting, and in it OUT of recipes/compare.sh:
<setting>/seed<k>/<recipe>/<method>.  The setting ``plain`` is the one that the others are told apart from.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from endprompt import BadInput, methods
from endprompt.evaluation import intervals, passkey, results
from endprompt.positions import coverage, plans
from endprompt.reports import compare, findings_tables
from endprompt.reports.findings_questions import PLAIN
from endprompt.rows import shards

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
    found = {PLAIN: found.pop(PLAIN), **found}
    compare.check(*found.values())
    return found


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
    """Keys found over the seeds' ``runs`` by ``task``: {"mean": cell over all lengths, of the seeds that have
    them all, or None, "distances":
    {distance: cell} at the greatest length, "never": the spans of distances that the first seed's rows lack,
    "seen", "unseen": {length: cell} of keys at distances that they have or lack}.

    A key at depth d of a text of n tokens is about (1 - d) x n before the question.
    """
    seeds = [rows for run in runs if (rows := results.read_run(run).rows(task))]
    if not seeds:
        return {}
    lengths = sorted({row["scores"]["length"] for rows in seeds for row in rows})
    whole = [rows for rows in seeds if {row["scores"]["length"] for row in rows} == set(lengths)]
    never = never_seen(runs[0], lengths[-1])
    counts = [
        (
            sum(cell["correct"] for row in rows for cell in row["scores"]["cells"]),
            sum(cell["total"] for row in rows for cell in row["scores"]["cells"]),
        )
        for rows in whole
    ]
    found: dict[str, Any] = {
        "mean": _over_seeds(counts) if counts else None,
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


def asked(question: dict) -> str:
    """What a score was asked, in short: all but the model, and the code and the harness, whose versions
    change."""
    told = {key: value for key, value in question.items() if key not in ("model", "code", "lm_eval")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def single(folders: list[Path], method: str) -> dict:
    """What ``method``'s results say a seed: {"values": {task: {length: {seed's folder: score}}}, "samples":
    {task: {length: keys a seed}}, "asked": {task: {length: ``asked``}}, "commits", "devices"}.
    """
    found: dict[str, dict[int, dict[str, float]]] = {task: {} for task in compare.TASKS}
    samples: dict[str, dict[int, int]] = {task: {} for task in passkey.TASKS}
    questions: dict[str, dict[int, str]] = {task: {} for task in compare.TASKS}
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
                questions[task][row["scores"]["length"]] = asked(row["question"])
                commits.add(str(row.get("commit"))[:12])
                devices.add(str(row.get("device")))
    stamps = {"commits": sorted(commits), "devices": sorted(devices)}
    return {"values": found, "samples": samples, "asked": questions, **stamps}


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
                    "name": method if setting == PLAIN else f"{method}, {setting}",
                    "different": different,
                    "target_length": (recipe.get("lengths") or {}).get("target"),
                    "scores": scores,
                    **single(folders, method),
                    **{task: keys(own, task) for task in passkey.TASKS},
                    "losses": losses(own),
                }
            )
    return entries


def read(path: Path) -> dict:
    """{"entries", ...} of a findings.json, as ``collect`` made them, or of a scaling.json.  Raises BadInput
    if it is none."""

    def numbers(tree: dict) -> dict:
        return {int(key) if key.isdigit() else key: value for key, value in tree.items()}

    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=numbers)
        for entry in record["entries"]:
            _check(entry)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise BadInput(
            f"{path} is no findings.json ({reason}); make it from the runs of recipes/lab.sh"
        ) from None
    return record


def _check(entry: dict) -> None:
    """Raises KeyError, TypeError or ValueError if an entry lacks a part that the tables read."""
    if not all(isinstance(entry[key], str) for key in ("method", "name")):
        raise ValueError("an entry's name is no text")
    parts = [(part, entry[part]) for part in ("samples", *passkey.TASKS)]
    parts += [(f"scores of {task}", entry["scores"][task]) for task in (*compare.TASKS, "training")]
    parts += [(f"values of {task}", entry["values"][task]) for task in compare.TASKS]
    if lacking := [part for part, held in parts if not isinstance(held, dict)]:
        raise ValueError(f"{entry['name']}: its {lacking[0]} are no mapping")


def _flat_lengths(entry: dict, part: str) -> dict[tuple[str, int], Any]:
    """{(task, length): value} of what an entry's ``part`` says by task and length."""
    return {(task, n): value for task, lengths in entry.get(part, {}).items() for n, value in lengths.items()}


def joined(sources: list[Path]) -> list[dict]:
    """The entries of ``sources`` (folders of runs, or findings.json files), later ones in the place of
    earlier ones.

    They are ordered by setting, the plain one first, then by the method table.  A mean over other lengths
    than the other entries have is left out.  Raises BadInput if a source holds no runs, or if one was tested
    on another number of keys at a length than a source before it, or asked something else there.
    """
    found: dict[tuple[str, str], dict] = {}
    before: dict[str, dict] = {"samples": {}, "asked": {}}
    order = list(methods.METHODS)
    for source in sources:
        here: dict[str, dict] = {"samples": {}, "asked": {}}
        for entry in _entries(source):
            for part, noted in before.items():
                told = _flat_lengths(entry, part)
                if unlike := [key for key, value in told.items() if noted.get(key, value) != value]:
                    said = _unlike(entry, part, unlike[0], told, noted)
                    raise BadInput(f"{source}: {said}; evaluate it alike")
                here[part] |= told
            found[entry["setting"], entry["method"]] = entry
        for part, told in here.items():
            before[part] |= told
    settings = list(dict.fromkeys(setting for setting, _ in found))
    return sorted(
        _of_all_lengths(list(found.values())),
        key=lambda entry: (
            entry["setting"] != PLAIN,
            settings.index(entry["setting"]),
            order.index(entry["method"]) if entry["method"] in order else len(order),
        ),
    )


def _entries(source: Path) -> list[dict]:
    if not source.is_file():
        return collect(source)
    entries = read(source)["entries"]
    needed = ("setting", "different", "losses")
    if lacking := [key for entry in entries for key in needed if key not in entry]:
        raise BadInput(
            f"{source} is no findings.json (an entry has no {lacking[0]}; a scaling.json has none); make it"
            " from the runs of recipes/lab.sh"
        )
    return entries


def _unlike(entry: dict, part: str, key: tuple[str, int], told: dict, noted: dict) -> str:
    task, length = key
    if part == "asked":
        return f"{entry['name']} was asked otherwise ({task} at {length}) than what it would stand beside"
    return (
        f"{entry['name']} was tested on {told[key]} keys ({task} at {length}), and what it would stand beside"
        f" on {noted[key]}"
    )


def _of_all_lengths(entries: list[dict]) -> list[dict]:
    """``entries``, without the means of those that lack a length which another has."""
    kept = []
    for entry in entries:
        entry = dict(entry)
        for task in passkey.TASKS:
            lengths = {length for one in entries for length in one["scores"][task]}
            if entry[task] and set(entry["scores"][task]) != lengths:
                entry[task] = {**entry[task], "mean": None}
        kept.append(entry)
    return kept
