"""What the paper prints (paper.yaml), recomputed: its averages from their columns, and the 64K table that it
does not print.

All arithmetic is on the printed decimals as fractions, so that "does not follow" cannot be a rounding error
of ours.
"""

import functools
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import yaml

from endprompt.evaluation import longbench_scores
from endprompt.recipe import task_names
from endprompt.reports.markdown import grid

SHORT, TARGET = (4096, 8192, 16384, 32768), 65536
# Half a unit of the last digit for the columns and as much for the average: a greater difference cannot be
# rounding.
ROUNDING = Fraction(1, 100)

# What a printed column is the mean of, as our task names.
_RULER = {name: (f"ruler_{name}",) for name in task_names.RULER}
_GROUPED = {
    "niah_single": tuple(f"ruler_niah_single_{i}" for i in (1, 2, 3)),
    "niah_multikey": tuple(f"ruler_niah_multikey_{i}" for i in (1, 2, 3)),
    **{name: (f"ruler_{name}",) for name in ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")},
    "qa": ("ruler_qa_1", "ruler_qa_2"),
}
_CATEGORIES = {
    category: tuple(f"longbench_{name}" for name in members)
    for category, members in longbench_scores.CATEGORIES.items()
}
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "ruler": {**_RULER, "avg": task_names.GROUPS["ruler"]},
    "ruler_groups": {**_GROUPED, "avg": task_names.GROUPS["ruler"]},
    "longbench": {**_CATEGORIES, "avg": task_names.GROUPS["longbench"]},
    "short_text": {**{name: (name,) for name in task_names.SHORT_TEXT}, "avg": tuple(task_names.SHORT_TEXT)},
    "averages": {"longbench_avg": task_names.GROUPS["longbench"], "ruler_avg": task_names.GROUPS["ruler"]},
    "cost": {"memory_gb": (), "hours": (), "speedup": ()},
}


@dataclass(frozen=True)
class Run:
    """A model whose results stand beside a printed row: trained by ``method`` under ``recipe`` with
    ``overrides``, in OUT/<suffix>.
    """

    name: str
    recipe: str
    method: str
    overrides: tuple[str, ...] = ()
    suffix: str = ""

    def folder(self, runs: Path) -> Path:
        return runs / self.suffix / self.recipe / self.method


@dataclass(frozen=True)
class Table:
    """A printed table or figure.  ``printed``: {row: {column: the figure as it is printed}}; ``rows``: {row:
    its run}; ``lengths``: those of RULER that a cell averages; ``after``: "sft" for models after supervised
    fine-tuning.
    """

    name: str
    title: str
    source: str
    columns: str
    printed: dict[str, dict[str, str]]
    rows: dict[str, Run]
    lengths: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    read_off_plot: dict[str, list[str]] = field(default_factory=dict)
    after: str = ""

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """{column: the tasks that it averages}."""
        return COLUMNS[self.columns]


@dataclass(frozen=True)
class Average:
    """A printed average beside the mean of its own columns, each weighted by the tasks behind it."""

    table: str
    row: str
    printed: str
    recomputed: Fraction

    @property
    def follows(self) -> bool:
        return abs(Fraction(self.printed) - self.recomputed) <= ROUNDING


@functools.cache
def load() -> dict:
    """paper.yaml with every figure as text."""
    return yaml.load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)


@functools.cache
def runs() -> dict[str, Run]:
    tree = load()
    return {
        name: Run(
            name,
            about.get("recipe", tree["recipe"]),
            about["method"],
            tuple(about.get("set", ())),
            about.get("suffix", ""),
        )
        for name, about in tree["runs"].items()
    }


@functools.cache
def tables() -> dict[str, Table]:
    """Every printed table and figure, and the derived one after Table 9, in the paper's order."""
    found = {}
    for name, about in load()["tables"].items():
        rows = {row: runs()[about.get("rows", {}).get(row, row)] for row in about["printed"]}
        if "recipe" in about:
            rows = {
                row: Run(run.name, about["recipe"], run.method, run.overrides, run.suffix)
                for row, run in rows.items()
            }
        found[name] = Table(
            name,
            about["title"],
            about["source"],
            about["columns"],
            about["printed"],
            rows,
            tuple(map(int, about.get("lengths", ()))),
            tuple(about.get("notes", ())),
            about.get("read_off_plot", {}),
            about.get("after", ""),
        )
        if name == "table_9":
            found["table_derived_64k"] = _derived(found)
    return found


def _derived(found: dict[str, Table]) -> Table:
    whole, shorter = found["table_1"], [found[f"table_{number}"] for number in (6, 7, 8, 9)]
    exact = {
        row: {
            column: 5 * Fraction(value) - sum(Fraction(table.printed[row][column]) for table in shorter)
            for column, value in cells.items()
            if column != "avg"
        }
        for row, cells in whole.printed.items()
    }
    # The average is over the derived columns: the printed averages give the same within their rounding, which
    # counts ninefold here.
    printed = {
        row: {
            column: f"{float(value):.2f}"
            for column, value in {**cells, "avg": sum(cells.values()) / len(cells)}.items()
        }
        for row, cells in exact.items()
    }
    notes = (
        (
            "Derived, not printed: 5 x Table 1 - (Table 6 + Table 7 + Table 8 + Table 9); rounding of the"
            " printed figures moves a cell by up to 0.045."
        ),
        (
            "By these averages the order at 64K is"
            f" {', '.join(sorted(printed, key=lambda row: -float(printed[row]['avg'])))}: at its own target"
            " length endprompt is last, and it wins Table 1 by 4K to 32K."
        ),
    )
    return Table(
        "table_derived_64k",
        "RULER at 64K (derived, not printed)",
        "derived from Tables 1 and 6 to 9",
        "ruler",
        printed,
        whole.rows,
        (TARGET,),
        notes,
    )


def averages(table: Table) -> list[Average]:
    """The printed averages of a table with columns, recomputed."""
    found = []
    for row, cells in table.printed.items():
        if "avg" in cells:
            weights = {column: len(table.parts[column]) for column in cells if column != "avg"}
            total = sum(Fraction(cells[column]) * weight for column, weight in weights.items())
            found.append(Average(table.name, row, cells["avg"], Fraction(total, sum(weights.values()))))
    return found


def shifted_rows() -> list[tuple[str, str, str, str, str]]:
    """(table, row, other table, other row, difference) of rows with equal columns, the average aside, that
    differ by one constant in all of them.
    """
    every = [
        (table, row, {column: Fraction(value) for column, value in cells.items() if column != "avg"})
        for table in tables().values()
        if table.columns in ("ruler", "ruler_groups", "longbench", "short_text")
        for row, cells in table.printed.items()
    ]
    found, seen = [], set()
    for index, (table, row, cells) in enumerate(every):
        for other_table, other_row, other in every[index + 1 :] if (table.name, row) not in seen else ():
            differences = (
                {other[column] - cells[column] for column in cells} if cells.keys() == other.keys() else set()
            )
            if len(differences) == 1 and (shift := differences.pop()):
                found.append((table.name, row, other_table.name, other_row, f"{float(shift):+.2f}"))
                seen.add((other_table.name, other_row))
    return found


def disagreements() -> list[str]:
    """Printed figures that contradict one another beyond rounding: the same run in two places, derived cells
    outside [0, 100], speed-ups and hours.
    """
    found, places = [], tables()
    for row, cells in places["table_derived_64k"].printed.items():
        found += [
            f"derived 64K, {row}, {column}: {value} is outside [0, 100]"
            for column, value in cells.items()
            if not 0 <= float(value) <= 100
        ]
    for ablation, whole in (("table_3", "table_1"), ("table_4", "table_2")):
        single, other = places[ablation], places[whole]
        for column, value in single.printed["main"].items():
            members = (
                [
                    member
                    for member, tasks in other.parts.items()
                    if set(tasks) <= set(single.parts[column]) and member != "avg"
                ]
                if column != "avg"
                else ["avg"]
            )
            total = sum(Fraction(other.printed["endprompt"][member]) for member in members)
            mean = Fraction(total, len(members))
            if abs(mean - Fraction(value)) > ROUNDING:
                found.append(
                    f"{single.source}, main, {column}: {value}, but {float(mean):.2f} by {other.source}"
                )
    for figure in ("figure_2", "figure_3"):
        for row, cells in places[figure].printed.items():
            if places[figure].rows[row].name == "endprompt":
                for column, table in (("longbench_avg", places["table_2"]), ("ruler_avg", places["table_1"])):
                    if cells[column] != (average := table.printed["endprompt"]["avg"]):
                        found.append(
                            f"{places[figure].source}, {row}, {column}: {cells[column]}, but {average} in"
                            f" {table.source}"
                        )
    cost = places["figure_4_64k"].printed
    for row, cells in cost.items():
        if "speedup" in cells and abs(
            Fraction(cells["hours"]) / Fraction(cost["endprompt"]["hours"]) - Fraction(cells["speedup"])
        ) > Fraction(2, 100):
            found.append(
                f"Figure 4, {row}: {cells['hours']} h read off the plot are not {cells['speedup']} times"
                f" {cost['endprompt']['hours']} h"
            )
    return found


def report() -> str:
    """Markdown: every printed average beside the recomputed one, and what else the printed figures say about
    one another.
    """
    return "\n".join(
        [
            *_recomputed(),
            "",
            "## At the target length",
            "",
            _at_the_target(tables()["table_derived_64k"]),
            "",
            "## Rows that differ by one constant",
            "",
            "In every column, the average aside; measurements do not do that.",
            "",
            *(
                f"- {tables()[other].source}, {other_row} = {tables()[table].source}, {row}"
                f" {shift[0]} {shift[1:]}"
                for table, row, other, other_row, shift in shifted_rows()
            ),
            "",
            "## The same figure in two places",
            "",
            *([f"- {item}" for item in disagreements()] or ["Nothing else disagrees beyond rounding."]),
            "",
        ]
    )


def _recomputed() -> list[str]:
    """The head of the report, and its table of averages."""
    every = [
        average
        for table in tables().values()
        for average in averages(table)
        if table.name != "table_derived_64k"
    ]
    wrong = [average for average in every if not average.follows]
    rows = [
        (
            tables()[average.table].source,
            [
                average.row,
                str(average.printed),
                f"{float(average.recomputed):.3f}",
                "yes" if average.follows else "**no**",
            ],
        )
        for average in every
    ]
    return [
        "# The paper's figures, recomputed",
        "",
        (
            f"{len(every)} printed averages, of which {len(wrong)} do not follow from their columns (more"
            f" than {float(ROUNDING)} from the mean over the tasks behind them: a column that stands for"
            " three tasks weighs three)."
        ),
        "",
        *grid("table", ["row", "printed", "recomputed", "follows"], rows).splitlines(),
    ]


def _at_the_target(derived: Table) -> str:
    cells = [
        float(value) for row in derived.printed.values() for column, value in row.items() if column != "avg"
    ]
    best_first = sorted(derived.printed.items(), key=lambda item: -float(item[1]["avg"]))
    return (
        f"The {len(cells)} cells derived for 64K lie between {min(cells):.2f} and {max(cells):.2f}."
        " Averages: " + ", ".join(f"{row} {value['avg']}" for row, value in best_first) + "."
    )
