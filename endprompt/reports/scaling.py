r"""How methods do at other targets and after other numbers of tokens: tables and pictures of several
laboratories.

    python -m endprompt.reports.scaling docs/findings/findings.json runs/lab-4096 runs/lab-quarter \
        --out docs/findings
    python -m endprompt.reports.scaling docs/findings/scaling.json --out docs/findings --page docs/findings.md

A source is an OUT of recipes/lab.sh, or a findings.json or scaling.json that was written before.  Of several
sources, what a later one says of a method in a setting, target and number of tokens stands in the place of
what an earlier one says.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from endprompt import BadInput, methods, storage
from endprompt.evaluation import figures, passkey
from endprompt.reports import findings, laboratory, markdown
from endprompt.reports.findings_questions import MEASURES, PLAIN, value
from endprompt.reports.findings_tables import cell
from endprompt.runs import provenance

KEPT = ("setting", "method", "name", "values", "samples", "commits", "devices")


def entries(sources: list[Path]) -> list[dict]:
    """An entry {those of KEPT, "target_length", "tokens": trained on (0 where nothing is), "scores",
    "passkey", "multikey": {"mean"}} for each method in a setting, target and number of tokens, in the order
    of the method table, the setting ``plain`` first; of those that have several targets or numbers of tokens.
    Raises BadInput if a source holds no runs.
    """
    found: dict[tuple[str, int, int], dict] = {}
    for source in sources:
        here = laboratory.read(source)["entries"] if source.is_file() else laboratory.collect(source)
        try:
            kept = [_kept(entry) for entry in here]
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{source} is no findings.json or scaling.json ({type(error).__name__}: {error}); make it"
                " from the runs of recipes/lab.sh"
            ) from None
        found |= {(one["name"], one["target_length"], one["tokens"]): one for one in kept if one}
    order, run = list(methods.METHODS), [name for name, _, _ in found]
    return sorted(
        (entry for entry in found.values() if run.count(entry["name"]) > 1),
        key=lambda one: (
            order.index(one["method"]),
            one["setting"] != PLAIN,
            one["name"],
            one["tokens"],
            one["target_length"],
        ),
    )


def _kept(entry: dict) -> dict | None:
    """What ``entries`` keeps of an entry of ``findings``; None if it has no keys, or none at its target, or
    its method is gone."""
    lengths = entry["scores"]["passkey"] or entry["scores"]["multikey"]
    if not lengths or entry["method"] not in methods.METHODS:
        return None
    setting = entry.get("setting", PLAIN)  # what a scaling.json held before is plain
    name = entry["method"] if setting == PLAIN else f"{entry['method']}, {setting}"
    target = entry.get("target_length") or max(lengths)
    if target not in lengths:
        print(
            f"scaling: {name} was not scored at its target of {target} tokens, and is left out",
            file=sys.stderr,
        )
        return None
    whole = entry | {"setting": setting, "name": name}
    return {key: whole[key] for key in KEPT} | {
        "target_length": target,
        "tokens": round(entry["scores"]["training"].get("tokens", 0)),
        "scores": entry["scores"],
        **{task: {"mean": entry[task].get("mean")} for task in passkey.TASKS},
    }


def _rows(found: list[dict]) -> dict[tuple[str, int], dict[int, dict]]:
    """{(name, tokens): {target: entry}}; what trains nothing has one row for all numbers of tokens."""
    rows: dict[tuple[str, int], dict[int, dict]] = {}
    for entry in found:
        rows.setdefault((entry["name"], entry["tokens"]), {})[entry["target_length"]] = entry
    return rows


def tables(found: list[dict]) -> dict[str, str]:
    """{name of the place: table} of the ``found`` entries, one a measure: a row a method in a setting and
    number of tokens, a column a target.
    """
    targets = sorted({entry["target_length"] for entry in found})
    result = {}
    for task, place, _ in MEASURES:
        form = "{:.2f}" if task == "perplexity" else "{:.0f}"
        rows = []
        for (name, tokens), here in _rows(found).items():
            cells = [value(here[target], task, place) if target in here else None for target in targets]
            rows.append(
                (f"`{name}`", [f"{tokens:,}" if tokens else "-", *[cell(one, form) for one in cells]])
            )
        result[f"scaling-{task}{'' if place else '-mean'}"] = markdown.grid(
            "method", ["tokens", *map(str, targets)], rows
        )
    return result


def draw(found: list[dict], out: Path, title: str | None = None) -> list[Path]:
    """Writes keys found at the target by target, after the most common number of tokens (targets.png,
    targets-multikey.png), and by number of tokens, at the most common target (tokens.png,
    tokens-multikey.png), where there are several of them.
    """
    trained, drawn = [entry for entry in found if entry["tokens"]], []
    for name, along, fixed, across in (
        ("targets", "target_length", "tokens", "target length in tokens"),
        ("tokens", "tokens", "target_length", "tokens trained on"),
    ):
        kinds = [entry[fixed] for entry in trained]
        usual = max(kinds, key=kinds.count, default=None)
        for task in passkey.TASKS:
            series: dict[str, dict[int, dict]] = {}
            for entry in trained:
                if entry[fixed] == usual and (at_target := value(entry, task, -1)):
                    series.setdefault(entry["name"], {})[entry[along]] = at_target
            if series := {name: cells for name, cells in series.items() if len(cells) > 1}:
                drawn.append(out / f"{name}{'' if task == 'passkey' else f'-{task}'}.png")
                figures.lines(series, drawn[-1], title, (f"{task} found at the target in %", across))
    return drawn


def scaling(sources: list[Path], out: Path, title: str | None = None, pages: Sequence[Path] = ()) -> None:
    """Writes scaling.json and the pictures of ``draw`` into ``out``, the tables into ``pages``, and prints
    them; scaling.json is left alone where it is the only source.  Raises BadInput if a source holds no runs,
    or a page is missing or has a place twice.
    """
    titles = [laboratory.read(source).get("title") for source in sources if source.is_file()]
    found, title = entries(sources), title or next(iter(titles), None)
    made = tables(found)
    texts = {page: markdown.filled(page, made) for page in pages}
    storage.output_folder(out)
    record = out / "scaling.json"
    if [source.resolve() for source in sources] != [record.resolve()]:
        storage.write_json(record, {"title": title, "entries": found, **provenance.stamp()})
    for page, content in texts.items():
        page.write_text(content, encoding="utf-8")
    text = "\n\n".join(f"<!-- {name} -->\n{table}\n<!-- /{name} -->" for name, table in made.items())
    print("\n".join([text, "", *map(str, [record, *draw(found, out, title), *pages])]))


def main() -> None:
    findings.command(scaling, __doc__ or "")


if __name__ == "__main__":
    main()
