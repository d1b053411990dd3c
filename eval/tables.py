"""The paper's tables and figures from result files: each cell ours | the paper's | the difference.

    python -m endprompt.eval.tables --runs runs --recipe tiny --out results

A cell that was not run says so; a printed figure is never put in its place.  Printed averages that do not follow from their columns are marked *.
The 64K table is not printed in the paper; it is computed as 5 x Table 1 - (Tables 6 to 9).
"""

import argparse
import csv
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from endprompt import BadInput, methods, provenance, shards
from endprompt.eval import compare, figures, longbench_scores, names

PAPER = Path(__file__).parent / "paper.yaml"
GROUPED = {"niah_single": names.RULER[:3], "niah_multikey": names.RULER[3:6], "niah_mv": ("niah_multivalue",), "niah_mq": ("niah_multiquery",), "vt": ("vt",), "cwe": ("cwe",),
           "fwe": ("fwe",), "qa": names.RULER[11:]}
# For each kind of table: column -> the tasks whose mean it is.
COLUMNS = {"ruler": {task: (task,) for task in names.RULER}, "ruler_groups": GROUPED, "longbench": longbench_scores.CATEGORIES,
           "short_text": {task: (task,) for task in names.SHORT_TEXT}}
PREFIX = {"ruler": "ruler_", "ruler_groups": "ruler_", "longbench": "longbench_", "short_text": ""}
NOTES = {
    "table1": "Of the 13 tasks at 4K, 8K, 16K, 32K and 64K. Subtracting the printed tables of 4K to 32K leaves the 64K column, which the paper does not print (derived_64k): "
              "at the target length EndPrompt is last.",
    "table2": "Only EndPrompt's printed average is the mean over the 16 tasks. The three baselines' follow neither from that nor from the plain mean, and in all six columns "
              "LongLoRA is LCEG minus 1.00 and full-length is LCEG plus 1.00. The official script prints no average; ours is the mean over the 16 tasks.",
    "table5": "The paper names neither its fine-tuning data nor the variants of the metrics. Ours: MMLU 5-shot acc, GSM8K 5-shot exact match (strict), HellaSwag 10-shot acc_norm, "
              "HumanEval pass@1 (greedy), by lm-evaluation-harness.",
    "figure4": "The paper prints 36.52 and 76.00 GB at 64K and the ratios 1.41, 1.69, 1.77; its other bars are read off the plot, to about 1.",
    "derived_64k": "Derived, not printed: 5 x Table 1 - (Tables 6 to 9).",
}


@dataclass(frozen=True)
class Cell:
    """One figure of ours: its value, half of its 95 % interval, and the fewest samples behind it."""

    value: float
    half: float
    samples: int


def mean(cells: list[Cell | None]) -> Cell | None:
    """Their mean, with the half width of independent errors; None if one is missing."""
    if not cells or None in cells:
        return None
    return Cell(sum(cell.value for cell in cells) / len(cells), math.sqrt(sum(cell.half ** 2 for cell in cells)) / len(cells), min(cell.samples for cell in cells))


def result(run: Path, task: str, length: int | None) -> Cell | None:
    """The result of ``task`` in a run's folder; for a task without a length, or LongBench, at whatever it was scored.  Raises BadInput if it cannot be read."""
    folder = run / "eval" / task
    paths = [folder / f"{length}.json"] if length else sorted(folder.glob("*.json"))
    if len(paths) > 1:
        raise BadInput(f"{folder} holds several results ({', '.join(path.name for path in paths)}); keep the one that the table shall show")
    if not paths or not paths[0].is_file():
        return None
    try:
        scores = json.loads(paths[0].read_text())["scores"]
        return Cell(float(scores["score"]), (scores["high"] - scores["low"]) / 2, int(scores["samples"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{paths[0]} is no result ({type(error).__name__}: {error}); delete it and evaluate again") from None


def ours(run: Path, kind: str, lengths: list[int] | None) -> dict[str, Cell | None]:
    """{column: our figure} of one row, ``avg`` over the tasks among them."""
    found = {task: mean([result(run, PREFIX[kind] + task, length) for length in lengths or [None]]) for tasks in COLUMNS[kind].values() for task in tasks}
    return {**{column: mean([found[task] for task in tasks]) for column, tasks in COLUMNS[kind].items()}, "avg": mean(list(found.values()))}


def printed_average(kind: str, row: dict[str, float]) -> float:
    """The average that follows from the printed columns of a row, each weighed by its tasks."""
    weights = {column: len(tasks) for column, tasks in COLUMNS[kind].items()}
    return sum(row[column] * weight for column, weight in weights.items()) / sum(weights.values())


def check(paper: dict) -> list[dict]:
    """Every printed average beside the one that follows from its columns: {"table", "row", "printed", "follows", "holds"}.

    Columns are rounded to 0.01 each, grouped ones are means of rounded ones: a difference up to 0.015 is rounding.
    """
    found = []
    for name, table in paper["tables"].items():
        for row, cells in table["rows"].items():
            follows = printed_average(table["kind"], cells)
            found.append({"table": name, "row": row, "printed": cells["avg"], "follows": round(follows, 2), "holds": abs(follows - cells["avg"]) <= 0.015})
    return found


def derived(paper: dict) -> dict[str, dict[str, float]]:
    """{method: {column: percent}} of RULER at 64K: 5 x Table 1 - (Tables 6 to 9)."""
    tables, found = paper["tables"], {}
    for row, cells in tables["table1"]["rows"].items():
        columns = {column: round(5 * cells[column] - sum(tables[f"table{number}"]["rows"][row][column] for number in (6, 7, 8, 9)), 2) for column in COLUMNS["ruler"]}
        found[row] = {**columns, "avg": round(sum(columns.values()) / len(columns), 2)}
    return found


def folder_of(paper: dict, runs: Path, recipe: str, row: str, base: bool) -> Path | None:
    """Where the run of a table's row is; None if the base recipe is not the paper's and the row is one of its ablations."""
    if row in methods.METHODS:
        return runs / recipe / row
    if row in ("main", "EP_1"):
        return runs / recipe / "endprompt"
    return runs / "ablations" / row / paper["runs"][row]["recipe"] / "endprompt" if base and row in paper["runs"] else None


def _cost(run: Path | None) -> dict[str, float]:
    """{"memory_gb": 1e9 bytes a device, "hours"} of a training on a GPU; {} if there was none."""
    try:
        record = json.loads((run / "train.json").read_text()) if run else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise BadInput(f"{run / 'train.json'} cannot be read; delete the run and train again") from None
    if not record or str(record.get("device", "CPU")).startswith("CPU"):
        return {}
    return {"memory_gb": record["final_peak_memory_gib"] * 1.073741824, "hours": record["seconds"] / 3600}


def shown(cell: Cell | None, printed: float | None, mark: str = "") -> str:
    """*ours | paper | difference* of one cell."""
    mine = "not run" if cell is None else f"{cell.value:.2f}" + (f" ±{cell.half:.2f}" if cell.half else "")
    theirs = "-" if printed is None else f"{printed:.2f}{mark}"
    return f"{mine} | {theirs} | " + ("-" if cell is None or printed is None else f"{cell.value - printed:+.2f}")


class Writer:
    """Puts tables into a folder as markdown and CSV, and remembers what it wrote."""

    def __init__(self, out: Path):
        self.out, self.written = out, []
        out.mkdir(parents=True, exist_ok=True)

    def table(self, name: str, title: str, rows: dict[str, dict[str, tuple[Cell | None, float | None, str]]], notes: list[str]) -> None:
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        lines = [f"# {name}: {title}", "", "Each cell: ours \\| paper \\| difference.", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["table", "row", "column", "ours", "half_interval", "samples", "paper", "difference"])
        for row, cells in rows.items():
            lines.append(f"| {row} | " + " | ".join(shown(*cells[column]).replace("|", "\\|") if column in cells else "-" for column in columns) + " |")
            for column, (cell, printed, _) in cells.items():
                table.writerow([name, row, column, *(["not run", "", ""] if cell is None else [f"{cell.value:.2f}", f"{cell.half:.2f}", cell.samples]),
                                "" if printed is None else f"{printed:.2f}", "" if cell is None or printed is None else f"{cell.value - printed:.2f}"])
        shards.write_atomically(self.out / f"{name}.md", "\n".join([*lines, "", *notes, ""]).encode())
        shards.write_atomically(self.out / f"{name}.csv", text.getvalue().encode())
        self.written += [(f"{name}.md", title), (f"{name}.csv", title)]

    def picture(self, name: str, title: str) -> Path:
        self.written.append((name, title))
        return self.out / name


def _notes(rows: dict, name: str, marked: bool) -> list[str]:
    cells = [cell for columns in rows.values() for cell, _, _ in columns.values() if cell]
    found = [NOTES[name]] if name in NOTES else []
    if marked:
        found.append("\\* does not follow from its columns (paper-check.md).")
    if cells:
        found.append(f"Ours: at least {min(cell.samples for cell in cells)} samples a task (the official number is 500 for RULER); ± is half of the 95 % "
                     "interval (bootstrap over samples; of means, as for independent errors).")
    else:
        found.append("Nothing of it was run here.")
    return found


def make(paper: dict, runs: Path, recipe: str, out: Path) -> list[tuple[str, str]]:
    """Writes every table and figure into ``out`` and returns (file, title) of each.  Raises BadInput for results that cannot be read."""
    base, writer = recipe == paper["base"]["recipe"], Writer(out)
    findings = check(paper)
    broken = {(finding["table"], finding["row"]) for finding in findings if not finding["holds"]}
    whose = [] if base else [f"Ours is {recipe}; the paper's is {paper['base']['model']} at 64K, so the difference compares two models."]

    def rows_of(table: dict, name: str, lengths) -> dict:
        found = {}
        for row, printed in table.items():
            run = folder_of(paper, runs, recipe, row, base)
            mine = ours(run, paper["tables"].get(name, {"kind": "ruler"})["kind"], lengths) if run else {}
            found[row] = {column: (mine.get(column), value, "*" if column == "avg" and (name, row) in broken else "") for column, value in printed.items()}
        return found

    for name, table in paper["tables"].items():
        rows = rows_of(table["rows"], name, table.get("lengths"))
        extra = [method for method in methods.METHODS if method not in rows and table["kind"] in ("ruler", "longbench") and (runs / recipe / method / "eval").is_dir()]
        if name not in ("table3", "table4"):  # methods of ours that the paper's table does not have
            for method in extra:
                mine = ours(runs / recipe / method, table["kind"], table.get("lengths"))
                if any(mine.values()):
                    rows[method] = {column: (mine[column], None, "") for column in [*COLUMNS[table["kind"]], "avg"]}
        writer.table(name, table["title"], rows, [*whose, *_notes(rows, name, any(row == name for row, _ in broken))])
        if table["kind"] == "longbench":
            figures.bars({row: {column: (cells[column][0] and cells[column][0].value, cells[column][1]) for column in COLUMNS["longbench"]} for row, cells in rows.items()},
                         writer.picture(f"{name}.png", table["title"]), "score in %", table["title"])
    rows = rows_of(derived(paper), "derived_64k", [65536])
    writer.table("derived_64k", "RULER at 64K", rows, [*whose, *_notes(rows, "derived_64k", False)])

    by_length = {}
    for method in methods.METHODS:
        cells = {length: ours(runs / recipe / method, "ruler", [length])["avg"] for length in paper["tables"]["table1"]["lengths"]}
        if any(cells.values()):
            by_length[method] = {length: {"mean": cell.value, "low": cell.value - cell.half, "high": cell.value + cell.half} for length, cell in cells.items() if cell}
    if by_length:
        figures.lines(by_length, writer.picture("ruler-lengths.png", "RULER against length"), f"{recipe}: RULER, mean of 13 tasks", "score in %, with 95 % interval")

    kinds = {"longbench": ("longbench", None), "ruler": ("ruler", paper["tables"]["table1"]["lengths"])}
    for name in ("figure2", "figure3"):
        rows = {}
        for row, printed in paper["figures"][name]["rows"].items():
            run = folder_of(paper, runs, recipe, row, base)
            rows[row] = {column: (ours(run, *kinds[column])["avg"] if run else None, value, "") for column, value in printed.items()}
        _figure(writer, name, paper["figures"][name]["title"], rows, whose, "mean score in %")
    rows = {}
    for row, printed in paper["figures"]["figure4"]["rows"].items():
        method, _, target = row.partition(" ")
        run = (runs / recipe / method) if target == "64k" else folder_of(paper, runs, recipe, "length-32k", base) if method == "endprompt" else None
        cost = _cost(run)
        rows[row] = {column: (Cell(cost[column], 0.0, 1) if column in cost else None, value, "") for column, value in printed.items()}
    _figure(writer, "figure4", paper["figures"]["figure4"]["title"], rows, whose, "GB a device / hours")

    lines = ["# paper-check: printed averages against their own columns", "", "| table | row | printed | follows from the columns | |", "|---|---|---|---|---|"]
    lines += [f"| {found['table']} | {found['row']} | {found['printed']:.2f} | {found['follows']:.2f} | {'' if found['holds'] else 'does not follow'} |" for found in findings]
    outside = [(row, column) for row, cells in derived(paper).items() for column, value in cells.items() if not 0 <= value <= 100]
    averages = {row: cells["avg"] for row, cells in derived(paper).items()}
    order = [f"{row} {averages[row]:.2f}" for row in sorted(averages, key=averages.get, reverse=True)]
    lines += ["", f"{sum(found['holds'] for found in findings)} of {len(findings)} follow. Cells of the derived 64K table outside [0, 100]: {len(outside)}. "
              f"Its order at 64K: {', '.join(order)}.", ""]
    shards.write_atomically(out / "paper-check.md", "\n".join(lines).encode())
    writer.written.append(("paper-check.md", "printed averages against their own columns"))
    folder = runs / recipe
    if any((folder / method / "eval" / task).is_dir() for method in methods.METHODS for task in compare.TASKS):
        compare.compare([folder], out, f"{recipe}: keys found")
        title = "In place of RULER: passkey and perplexity" if not by_length else "Passkey and perplexity"
        writer.written += [(name, title) for name in ("comparison.md", "comparison.json", "comparison.png", "comparison-lines.png") if (out / name).exists()]
    return writer.written


def _figure(writer: Writer, name: str, title: str, rows: dict, whose: list[str], unit: str) -> None:
    writer.table(name, title, rows, [*whose, *_notes(rows, name, False)])
    figures.bars({row: {column: (cell and cell.value, printed) for column, (cell, printed, _) in cells.items()} for row, cells in rows.items()},
                 writer.picture(f"{name}.png", title), unit, title)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where the runs are (OUT of run.sh)")
    parser.add_argument("--recipe", default="llama3-8b-64k", metavar="NAME", help="whose runs supply our side of the main tables")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.runs.is_dir():
            raise BadInput(f"--runs: there is no folder {arguments.runs}")
        written = make(yaml.safe_load(PAPER.read_text(encoding="utf-8")), arguments.runs, arguments.recipe, arguments.out)
    except BadInput as error:
        print(f"tables: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    stamp = provenance.stamp()
    lines = [f"# Results of {arguments.recipe}", "", f"Made by `python -m endprompt.eval.tables --recipe {arguments.recipe}` on {stamp['date']}, commit {stamp['commit']}, "
             f"{stamp['device']}; " + ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version) + ". Each result file names its own.", ""]
    if not (arguments.out / "ruler-lengths.png").exists() and (arguments.out / "comparison.md").exists():
        lines += ["RULER was not run: passkey and perplexity stand in its place (comparison.md).", ""]
    lines += [f"- [{file}]({file}): {title}" for file, title in written]
    shards.write_atomically(arguments.out / "index.md", "\n".join([*lines, ""]).encode())
    print(arguments.out / "index.md")


if __name__ == "__main__":
    main()
