"""What a laboratory of runs says: tables, curves of the losses, keys found by length and by distance, and every number as JSON.

    python -m endprompt.eval.findings runs/lab --out docs/findings

RUNS holds a folder a setting, and in it OUT of recipes/compare.sh: RUNS/<setting>/seed<k>/<recipe>/<method>.  The setting ``plain`` is the one
that the others are told apart from.
"""

import argparse
import json
import sys
from pathlib import Path

from endprompt import BadInput, coverage, methods, positions, provenance, shards
from endprompt.eval import compare, figures, intervals, results

PLAIN = "plain"
STEPS = (8, 64, 128, 192)  # at which the table names the end-prompt loss


def settings(runs: Path) -> dict[str, list[Path]]:
    """{setting: folders of its recipe, one a seed} below ``runs``, ``plain`` first.  Raises BadInput if there is no plain one, or the folders of a
    setting do not belong together."""
    found: dict[str, list[Path]] = {}
    for folder in sorted({path.parent.parent for path in runs.glob("*/seed*/*/*/eval") if path.parent.name in methods.METHODS}):
        found.setdefault(folder.parent.parent.name, []).append(folder)
    if PLAIN not in found:
        raise BadInput(f"{runs} holds no evaluated run {PLAIN}/seed<k>/<recipe>/<method>; make them with recipes/lab.sh first")
    for folders in found.values():
        compare.check(folders)
    return {PLAIN: found.pop(PLAIN), **found}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    return {key: value for name, inner in tree.items() for key, value in
            (_flat(inner, f"{prefix}{name}.").items() if isinstance(inner, dict) else [(prefix + name, inner)])}


def difference(plain: dict, other: dict) -> str:
    """The keys of ``other``'s setting that are not as in ``plain``'s, as ``--set`` takes them."""
    plain, other = _flat(plain), _flat(other)
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(other.items()) if plain.get(key) != value)


def spread(values: list[float]) -> dict:
    """{"mean", "low", "high", "seeds"}: the mean and the least and greatest of one value a seed."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "seeds": len(values)}


def losses(runs: list[Path]) -> dict[str, dict[int, dict]]:
    """{"text_loss" and, where rows have one, "end_prompt_loss": {step: ``spread`` over the seeds' ``runs``}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        record = results.training(run) or {}
        for entry in record.get("history", []):
            for key in ("text_loss", "end_prompt_loss"):
                if key in entry:
                    found.setdefault(key, {}).setdefault(entry["step"], []).append(entry[key])
    return {key: {step: spread(values) for step, values in sorted(by_step.items())} for key, by_step in found.items()}


def _over_seeds(counts: list[tuple[int, int]]) -> dict:
    """The cell of ``intervals.over_seeds`` of (keys found, keys) a seed, in percent."""
    low, high = intervals.wilson(*counts[0])
    return intervals.over_seeds([100 * hits / total for hits, total in counts], (100 * low, 100 * high), 0.0, 100.0)


def never_seen(run: Path, length: int) -> list[tuple[int, int]] | None:
    """Spans of distances below ``length`` that no row of ``run``'s shards has; None where there are no shards."""
    if not (run / "shards" / shards.MANIFEST).is_file():
        return None
    manifest = shards.read_manifest(run / "shards")
    rows = (positions.segments(row) for row in shards.position_ids(run / "shards", manifest))
    return coverage.gap(coverage.counted(coverage.pair_counts(rows, manifest["target_length"])[:length]), length)


def passkey(runs: list[Path]) -> dict:
    """Keys found over the seeds' ``runs``: {"mean": cell over all lengths, "distances": {distance: cell} at the greatest length, "never": the
    spans of distances that the first seed's rows lack, "seen", "unseen": {length: cell} of keys at distances that they have or lack}.

    A key at depth d of a text of n tokens is about (1 - d) x n before the question.
    """
    seeds = [rows for run in runs if (rows := figures.read(run / "eval" / "passkey"))]
    if not seeds:
        return {}
    lengths = sorted({row["scores"]["length"] for rows in seeds for row in rows})
    never = never_seen(runs[0], lengths[-1])
    found = {"mean": _over_seeds([(sum(row["scores"]["correct"] for row in rows), sum(row["scores"]["samples"] for row in rows)) for rows in seeds]),
             "distances": {}, "never": never, "seen": {}, "unseen": {}}
    for length in lengths:
        cells: dict[int, list[tuple[int, int]]] = {}
        parted: dict[str, list[tuple[int, int]]] = {"seen": [], "unseen": []}
        for row in (row for rows in seeds for row in rows if row["scores"]["length"] == length):
            here = {round((1 - cell["depth"]) * (length - 1)): (cell["correct"], cell["total"]) for cell in row["scores"]["cells"]}
            for distance, count in here.items():
                cells.setdefault(distance, []).append(count)
            for kind, wanted in (("seen", False), ("unseen", True)):
                chosen = [count for distance, count in here.items() if any(low <= distance <= high for low, high in never or []) is wanted]
                if never is not None and chosen:
                    parted[kind].append(tuple(map(sum, zip(*chosen, strict=True))))
        if length == lengths[-1]:
            found["distances"] = {distance: _over_seeds(counts) for distance, counts in sorted(cells.items())}
        for kind, counts in parted.items():
            if counts:
                found[kind][length] = _over_seeds(counts)
    return found


def collect(runs: Path) -> list[dict]:
    """An entry {"setting", "method", "name", "different", "scores": of ``compare.summary``, "passkey", "losses"} for each setting and method below ``runs``."""
    entries, plain = [], None
    for setting, folders in settings(runs).items():
        for method, scores in compare.summary(folders).items():
            own = [folder / method for folder in folders if (folder / method / "eval").is_dir()]
            recipe = compare.run_setting(own[0] / "recipe.yaml")[1]
            plain = plain or recipe
            different = difference(plain, recipe) if setting != PLAIN else ""
            entries.append({"setting": setting, "method": method, "name": f"{method}, {setting}" if different else method, "different": different,
                            "scores": scores, "passkey": passkey(own), "losses": losses(own)})
    return entries


def _cell(cell: dict | None, form: str = "{:.0f}") -> str:
    return "-" if cell is None else f"{form.format(cell['mean'])} [{form.format(cell['low'])}, {form.format(cell['high'])}]"


def table(entries: list[dict]) -> str:
    """Markdown: a row an entry; keys found in % by length and over all lengths, perplexity at the least and the greatest length, losses at the end."""
    lengths = sorted({length for entry in entries for length in entry["scores"]["passkey"]})
    scored = sorted({length for entry in entries for length in entry["scores"]["perplexity"]})
    ends = list(dict.fromkeys(scored[:1] + scored[-1:]))
    head = ["method", "setting", "seeds", *[f"keys {length}" for length in lengths], "keys, mean", *[f"perplexity {length}" for length in ends], "text loss", "end-prompt loss"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in entries:
        scores, training = entry["scores"], entry["scores"]["training"]
        seeds = max(cell["seeds"] for task in ("passkey", "perplexity") for cell in scores[task].values())
        lines.append("| " + " | ".join([
            f"`{entry['method']}`", f"`{entry['different']}`" if entry["different"] else "", str(seeds), *[_cell(scores["passkey"].get(length)) for length in lengths],
            _cell(entry["passkey"].get("mean")), *[_cell(scores["perplexity"].get(length), "{:.3f}") for length in ends],
            *[f"{training[key]:.3f}" if key in training else "-" for key in ("final_text_loss", "final_end_prompt_loss")]]) + " |")
    return "\n".join(lines)


def seen_table(entries: list[dict]) -> str:
    """Markdown: keys found in % at distances that training rows have and at those they lack, for each length where a method has both."""
    lines = ["| method | length | at distances seen | at distances never seen |", "|---|---|---|---|"]
    for entry in entries:
        for length, cell in entry["passkey"].get("unseen", {}).items():
            lines.append(f"| `{entry['name']}` | {length} | {_cell(entry['passkey']['seen'].get(length))} | {_cell(cell)} |")
    return "\n".join(lines)


def prompt_table(entries: list[dict]) -> str:
    """Markdown: the end-prompt loss in nats a token at some steps, mean with least and greatest seed."""
    lines = ["| method | " + " | ".join(f"step {step}" for step in STEPS) + " |", "|" + "---|" * (len(STEPS) + 1)]
    for entry in entries:
        if series := entry["losses"].get("end_prompt_loss"):
            lines.append(f"| `{entry['name']}` | " + " | ".join(_cell(series.get(step), "{:.3f}") for step in STEPS) + " |")
    return "\n".join(lines)


def findings(runs: Path, out: Path, title: str | None = None) -> None:
    """Writes findings.json, tables.md, losses.png, keys.png and distances.png into ``out`` and prints the tables.  Raises BadInput if ``runs`` holds none."""
    entries = collect(runs)
    plain = [entry for entry in entries if entry["setting"] == PLAIN]
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([table(entries), prompt_table(entries), seen_table(entries)])
    (out / "tables.md").write_text(text + "\n")
    shards.write_json(out / "findings.json", {"entries": entries, **provenance.stamp()})
    trained = [entry for entry in plain if entry["losses"]]
    panels = {heading: {entry["name"]: entry["losses"][key] for entry in trained if key in entry["losses"]}
              for heading, key in (("text loss", "text_loss"), ("end-prompt loss", "end_prompt_loss"))}
    figures.curves({heading: series for heading, series in panels.items() if series} or {"text loss": {}}, out / "losses.png", title)
    figures.lines({entry["name"]: entry["scores"]["passkey"] for entry in plain if entry["scores"]["passkey"]}, out / "keys.png", title)
    figures.distances({entry["name"]: (entry["passkey"]["distances"], entry["passkey"]["never"] or []) for entry in entries if entry["passkey"]}, out / "distances.png", title)
    print("\n".join([text, "", *(str(out / name) for name in ("tables.md", "findings.json", "losses.png", "keys.png", "distances.png"))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the settings' folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--title", default=None)
    arguments = parser.parse_args()
    try:
        findings(arguments.runs, arguments.out, arguments.title)
    except BadInput as error:
        print(f"findings: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
