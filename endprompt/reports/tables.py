"""The paper's Tables 1 to 9 and Figures 2 to 4 with our results beside the printed figures, and a page for
each recipe that was run.

    python -m endprompt.reports.tables --runs runs --out results [--recipe NAME ...] [--model METHOD=DIR ...]

A cell is ours | paper | difference; what was not run says so.  Ours comes from the runs that paper.yaml
names, OUT/<recipe>/<method>.
"""

import argparse
import csv
import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.evaluation import results
from endprompt.evaluation.results import Estimate, Missing, Results
from endprompt.reports import paper, recipe_page, table_figures
from endprompt.runs import provenance

GIB, FIELDS = (
    2**30,
    ("table", "row", "column", "ours", "low", "high", "samples", "paper", "difference", "mark"),
)
NOT_FOLLOWING, READ_OFF = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """Ours beside the printed figure, which is text; ``mark``: what is to be said about the printed one."""

    ours: Estimate | Missing
    paper: str | None
    mark: str = ""

    @property
    def difference(self) -> float | None:
        return (
            self.ours.score - float(self.paper)
            if isinstance(self.ours, Estimate) and self.paper is not None
            else None
        )

    def fields(self) -> tuple[str, ...]:
        """ours, low, high, samples, paper, difference, mark, as both forms of a table show them."""
        shown = (
            [f"{value:.2f}" for value in (self.ours.score, self.ours.low, self.ours.high)]
            if isinstance(self.ours, Estimate)
            else ["not run", "", ""]
        )
        if isinstance(self.ours, Estimate) and self.ours.low == self.ours.high == self.ours.score:
            shown[1:] = ["", ""]  # measured once, such as memory
        samples = str(self.ours.samples or "") if isinstance(self.ours, Estimate) else ""
        return (
            *shown,
            samples,
            self.paper if self.paper is not None else "",
            "" if self.difference is None else f"{self.difference:+.2f}",
            self.mark,
        )


@dataclass
class Filled:
    """A table of the paper with our side: ``cells`` {column of the paper: {row of the paper: Cell}}, turned
    round so that it stays narrow.
    """

    about: paper.Table
    cells: dict[str, dict[str, Cell]]
    notes: list[str]
    pictures: list[str] = field(default_factory=list)


def render(shown: tuple[str, ...]) -> str:
    """The markdown of a cell from the fields of ``Cell.fields``, as a CSV line has them too."""
    ours, low, high, _, printed, difference, mark = shown
    interval = f" [{low}, {high}]" if low else ""
    return f"{ours}{interval} \\| {printed or '-'}{mark} \\| {difference or '-'}"


def markdown(table: Filled) -> str:
    rows = list(table.about.printed)
    printed = (
        "derived from the paper's figures, not printed"
        if table.about.name == "table_derived_64k"
        else "paper"
    )
    lines = [
        f"# {table.about.title}",
        "",
        (
            f"{table.about.source[0].upper()}{table.about.source[1:]} of the paper ({paper.load()['paper']})."
            f" Cells: ours with its 95 % interval \\| {printed} \\| difference."
        ),
        "",
        "| | " + " | ".join(f"{row}" for row in rows) + " |",
        "|" + "---|" * (len(rows) + 1),
    ]
    lines += [
        f"| {column} | "
        + " | ".join(render(cells[row].fields()) if row in cells else "-" for row in rows)
        + " |"
        for column, cells in table.cells.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            *(f"![{table.about.title}]({picture})\n" for picture in table.pictures),
            *(f"- {note}" for note in table.notes),
            "",
        ]
    )


def as_csv(table: Filled) -> str:
    """One line a cell, with the fields that ``markdown`` shows."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for column, cells in table.cells.items():
        for row, cell in cells.items():
            writer.writerow((table.about.name, row, column, *cell.fields()))
    return out.getvalue()


class Runs:
    """The folders of results, each read once.  ``models``: {method: a model that stands in for the trained
    one in runs without a suffix}.
    """

    def __init__(self, folder: Path, models: dict[str, str]):
        self.folder, self.models = folder, models
        self._read: dict[tuple, Results] = {}

    def named(self, run: paper.Run) -> str | None:
        """The model that was named for a run."""
        return None if run.suffix else self.models.get(run.method)

    def stand_in(self, run: paper.Run) -> str | None:
        return results.stand_in(self.folder, run.folder(self.folder), self.named(run))

    def results(self, run: paper.Run, after: str = "") -> Results:
        key = (run.folder(self.folder), after)
        if key not in self._read:
            self._read[key] = results.read_run(key[0], self.stand_in(run), after)
        return self._read[key]

    def training(self, run: paper.Run) -> dict | None:
        return results.training(run.folder(self.folder))


def parts(tasks: tuple[str, ...], lengths: tuple[int, ...], found: Results) -> list[tuple[str, int | None]]:
    """The results that a cell averages: RULER at ``lengths``; LongBench at the one length its prompts were
    cut to; short text once.
    """
    wanted: list[tuple[str, int | None]] = []
    for task in tasks:
        if task.startswith("ruler_"):
            wanted += [(task, length) for length in lengths]
        else:
            wanted.append((task, next(iter(found.lengths(task)[-1:]), None)))
    return wanted


def fill(about: paper.Table, runs: Runs) -> Filled:
    """Our side of a printed table.  Raises BadInput for a result file that cannot be read."""
    if about.columns == "cost":
        return _fill_cost(about, runs)
    marks = {average.row: NOT_FOLLOWING for average in paper.averages(about) if not average.follows}
    notes: list[str] = []
    cells: dict[str, dict[str, Cell]] = {column: {} for column in about.parts}
    for row, printed in about.printed.items():
        found = runs.results(about.rows[row], about.after)
        for column, tasks in about.parts.items():
            ours = found.mean(parts(tasks, about.lengths, found))
            cells[column][row] = Cell(
                ours, printed.get(column), marks.get(row, "") if column == "avg" else ""
            )
        widest = [cells[column][row].ours for column in about.parts]
        notes += [
            f"{row}: {ours.reason}."
            for ours in widest[-1:]
            if isinstance(ours, Missing) and ours.reason != "not run"
        ]
        if found.found and not about.after and runs.named(about.rows[row]) != runs.stand_in(about.rows[row]):
            notes.append(recipe_page.own_results(row, runs.named(about.rows[row])))
        notes += _provenance(row, found, [ours for ours in widest if isinstance(ours, Estimate)], about)
    if all(isinstance(cell.ours, Missing) for column in cells.values() for cell in column.values()):
        needed = "; ".join(dict.fromkeys(str(run.folder(runs.folder)) for run in about.rows.values()))
        notes.insert(0, f"None of it was run here. It takes the results of {needed}.")
    return Filled(about, cells, [*_about_paper(about), *about.notes, *notes])


def _about_paper(about: paper.Table) -> list[str]:
    wrong = [average for average in paper.averages(about) if not average.follows]
    notes = []
    if wrong:
        notes.append(
            f"{NOT_FOLLOWING} The printed average does not follow from its columns, which give "
            + ", ".join(f"{average.row} {float(average.recomputed):.2f}" for average in wrong)
            + " (mean over tasks); see paper-check.md."
        )
    elif any("avg" in cells for cells in about.printed.values()) and about.name != "table_derived_64k":
        notes.append("Every printed average follows from its columns (mean over tasks); see paper-check.md.")
    if about.read_off_plot:
        notes.append(f"{READ_OFF} Not printed as a figure: read off the plot, to about 1.")
    return notes


def _provenance(row: str, found: Results, ours: list[Estimate], about: paper.Table) -> list[str]:
    """How many samples, which generator and scorer, where and with what: of the files behind a row."""
    files = {id(file): file for estimate in ours for file in estimate.files}.values()
    if not files:
        return []
    counts = sorted({file["scores"]["samples"] for file in files})
    text = (
        f"{row}: {found.folder}, {counts[0]}"
        + (f" to {counts[-1]}" if len(counts) > 1 else "")
        + " samples a task"
        + (" and length" if about.lengths else "")
    )
    few = sorted(
        file["question"].get("task", "?")
        for file in files
        if file["scores"]["samples"] < results.full_samples(file["question"].get("task", ""))
    )
    if few:
        whole = "500" if about.columns.startswith("ruler") else "the benchmark has"
        text += f", **fewer than {whole}** in {len(few)} of {len(files)} results"
    generators = sorted(
        {str(file["question"]["generator"]) for file in files if file["question"].get("generator")}
    )
    if generators:
        text += f"; RULER's generator and scorers: {' / '.join(generators)}"
    metrics = sorted(
        {
            f"{file['question']['task']} {file['scores']['few_shots']}-shot"
            f" {file['scores'].get('metric', '')}"
            for file in files
            if "few_shots" in file["scores"]
        }
    )
    if metrics:
        text += "; " + ", ".join(metrics)
    cut = sorted(
        {
            file["scores"]["length"]
            for file in files
            if str(file["question"].get("task", "")).startswith("longbench_")
        }
    )
    if cut:
        text += f"; LongBench's prompts cut to {', '.join(map(str, cut))} tokens"
    for label, key, size in (("commit", "commit", 12), ("on", "device", 80), ("at", "date", 10)):
        text += f"; {label} {', '.join(sorted({str(file.get(key))[:size] for file in files}))}"
    if found.older:
        text += f"; {found.older} results of another model in that folder left out"
    return [text + "."]


def cost(record: dict | None) -> dict[str, float | None]:
    """Memory in 10^9 bytes and hours of a train.json.  A run that was resumed knows the hours since then
    only: none.
    """
    if record is None:
        return {"memory_gb": None, "hours": None}
    memory = record.get("final_peak_memory_gib")
    return {
        "memory_gb": None if memory is None else memory * GIB / 1e9,
        "hours": None if record.get("resumed_from") else record["seconds"] / 3600,
    }


def _fill_cost(about: paper.Table, runs: Runs) -> Filled:
    records = {row: runs.training(run) for row, run in about.rows.items()}
    found = {row: cost(record) for row, record in records.items()}
    own = found["endprompt"]["hours"]
    for row, values in found.items():
        values["speedup"] = values["hours"] / own if own and values["hours"] and row != "endprompt" else None
    columns = [
        column for column in about.parts if any(column in printed for printed in about.printed.values())
    ]
    cells = {
        column: {
            row: Cell(
                Missing() if (value := found[row][column]) is None else Estimate(value, value, value),
                printed[column],
                READ_OFF if column in about.read_off_plot.get(row, []) else "",
            )
            for row, printed in about.printed.items()
            if column in printed
        }
        for column in columns
    }
    notes = [f"The paper's: {paper.load()['hardware']}."]
    for row, record in records.items():
        if record:
            notes.append(
                f"{row}: {record.get('world_size')} ranks on {record.get('device')}, {record.get('tokens')}"
                f" tokens, commit {str(record.get('commit'))[:12]}"
                + (
                    "; **on CPU**: resident memory of a process, not of a GPU"
                    if str(record.get("device")).startswith("CPU")
                    else "; largest memory allocated on one GPU"
                )
                + (
                    f"; resumed from {record['resumed_from']}, so its hours are not known"
                    if record.get("resumed_from")
                    else ""
                )
                + "."
            )
    if not any(records.values()):
        notes.append(
            "None of it was run here. It takes the train.json of"
            f" {'; '.join(str(run.folder(runs.folder)) for run in about.rows.values())}."
        )
    return Filled(about, cells, [*_about_paper(about), *about.notes, *notes])


# Pictures


def write(runs: Runs, out: Path, recipes: list[str] | None, command: str) -> list[Path]:
    """Makes all tables and pictures in ``out``; returns what was written.  Raises BadInput, before anything
    is written, if a result cannot be read.

    ``recipes``: those that get a page of their own; None: all that were evaluated.
    """
    if not runs.folder.is_dir():
        raise BadInput(
            f"--runs: there is no folder {runs.folder}; name the one that `endprompt evaluate` wrote into"
        )
    for above in (out, *out.parents):
        if above.exists() and not above.is_dir():
            raise BadInput(f"--out: {above} is a file, not a folder; choose another")
    results.check_models(runs.folder, runs.models)
    filled = {name: fill(about, runs) for name, about in paper.tables().items()}
    pages = [
        recipe_page.Page(name, runs.folder, runs.models)
        for name in (results.recipes(runs.folder, runs.models) if recipes is None else recipes)
    ]
    stamp = provenance.stamp()
    out.mkdir(parents=True, exist_ok=True)
    table_figures.draw(filled, out)
    written = []

    def save(name: str, text: str) -> None:
        storage.write_atomically(out / name, text.encode())
        written.append(out / name)

    for name, table in filled.items():
        save(f"{name}.md", markdown(table))
        save(f"{name}.csv", as_csv(table))
    for page in pages:
        page.draw(out)
        save(f"recipe_{page.name}.md", page.markdown())
        save(f"recipe_{page.name}.csv", page.as_csv())
    save("paper-check.md", paper.report())
    save("index.md", index(filled, pages, stamp, command))
    return written


def index(filled: dict[str, Filled], pages: list["recipe_page.Page"], stamp: dict, command: str) -> str:
    lines = [
        "# Results",
        "",
        f"Made by `{command}` at commit {stamp['commit']}, {stamp['date']}, on {stamp['device']}; "
        + ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
        + ". The commit, device and date of each figure stand below its table.",
        "",
        "| table | title | ours | pictures |",
        "|---|---|---|---|",
    ]
    for name, table in filled.items():
        cells = [cell.ours for column in table.cells.values() for cell in column.values()]
        there = sum(isinstance(ours, Estimate) for ours in cells)
        lines.append(
            f"| [{table.about.source}]({name}.md) ([CSV]({name}.csv)) | {table.about.title} |"
            f" {f'{there} of {len(cells)} cells' if there else 'not run'} | "
            + " ".join(f"[{picture}]({picture})" for picture in table.pictures)
            + " |"
        )
    lines += ["", "[What of the printed figures does not add up](paper-check.md).", ""]
    if pages:
        lines += ["| recipe | ours | pictures |", "|---|---|---|"]
        lines += [
            f"| [{page.name}](recipe_{page.name}.md) ([CSV](recipe_{page.name}.csv)) |"
            f" {', '.join(page.benchmarks())} of {', '.join(page.methods)} | "
            + " ".join(f"[{picture}]({picture})" for picture in page.pictures)
            + " |"
            for page in pages
        ]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.reports.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the results are in DIR/<recipe>/<method>/eval (default: runs)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where tables and pictures go (default: results)",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        action="extend",
        default=None,
        metavar="NAME",
        help="recipes with a page of their own (default: all that were evaluated)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="METHOD=DIR",
        help="take for METHOD the results of this model, as `endprompt evaluate --model DIR` left them",
    )
    parser.add_argument(
        "--command",
        default=None,
        metavar="TEXT",
        help="what index.md names as the command that made it (default: this one)",
    )
    arguments = parser.parse_args(argv)
    command = arguments.command or shlex.join(
        ["python", "-m", "endprompt.reports.tables", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        written = write(
            Runs(arguments.runs, results.models(arguments.model)), arguments.out, arguments.recipe, command
        )
    except BadInput as error:
        print(f"tables: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{written[-1]}: {len(written)} files and their pictures")


if __name__ == "__main__":
    main()
