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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.evaluation import figures
from endprompt.reports import findings_questions, findings_tables, laboratory, markdown
from endprompt.reports.findings_questions import PLAIN
from endprompt.runs import provenance

CROWDED = 8  # lines in a picture; more are drawn in a panel for each method


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
        for key, heading in laboratory.LOSSES.items()
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


def findings(sources: list[Path], out: Path, title: str | None = None, pages: Sequence[Path] = ()) -> None:
    """Writes findings.json, tables.md and the pictures of ``draw`` into ``out``, the tables into ``pages``
    too, and prints them.

    sources: as ``laboratory.joined`` takes them; findings.json is left alone where it is the only source.
    Raises BadInput if one holds no runs, or a page is missing or has a place twice.
    """
    titles = [laboratory.read(source).get("title") for source in sources if source.is_file()]
    entries, title = laboratory.joined(sources), title or next(iter(titles), None)
    made = any(source.is_dir() for source in sources)
    tables = findings_tables.tables(entries) | findings_questions.tables(entries)
    texts = {page: markdown.filled(page, tables) for page in pages}
    storage.output_folder(out)
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
