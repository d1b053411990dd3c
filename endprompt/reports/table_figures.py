"""The pictures of the paper's tables, ours beside the printed figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from endprompt.evaluation import figures
from endprompt.evaluation.results import Estimate, Missing

if TYPE_CHECKING:
    from endprompt.reports.tables import Cell, Filled


def draw(filled: dict[str, Filled], out: Path) -> None:
    """The pictures of the paper's tables into ``out``, each noted in the tables it belongs to."""
    _draw_lengths(filled, out)
    for name in ("table_2", "table_5", "figure_2", "figure_3"):
        _draw_bars(filled[name], out)
    _draw_costs(filled, out)


def _draw_lengths(filled: dict[str, Filled], out: Path) -> None:
    by_length = {
        4096: "table_6",
        8192: "table_7",
        16384: "table_8",
        32768: "table_9",
        65536: "table_derived_64k",
    }
    tables = [filled[name] for name in by_length.values()]
    rows = list(tables[0].about.printed)
    ours = {
        row: {
            length: cell
            for length, name in by_length.items()
            if (cell := _interval(filled[name].cells["avg"][row].ours))
        }
        for row in rows
    }
    printed = {
        row: {length: _printed(filled[name].cells["avg"][row]) for length, name in by_length.items()}
        for row in rows
    }
    figures.lines(
        {row: cells for row, cells in ours.items() if cells},
        out / "ruler_by_length.png",
        _titled("RULER, mean of the 13 tasks (paper at 65536: derived)", *tables),
        "score in %",
        paper=printed,
    )
    for table in (filled["table_1"], *tables):
        table.pictures.append("ruler_by_length.png")


def _draw_bars(table: Filled, out: Path) -> None:
    name, rows = table.about.name, list(table.about.printed)
    groups = list(table.cells.values())
    figures.bars(
        [column.removesuffix("_avg") for column in table.cells],
        {row: [_interval(cells[row].ours) for cells in groups] for row in rows},
        out / f"{name}.png",
        _titled(table.about.title, table),
        {row: [_printed(cells[row]) for cells in groups] for row in rows},
    )
    table.pictures.append(f"{name}.png")


def _draw_costs(filled: dict[str, Filled], out: Path) -> None:
    panels = []
    for name, size in (("figure_4_64k", "64K"), ("figure_4_32k", "32K")):
        table = filled[name]
        for column, unit in (("memory_gb", "GB a GPU"), ("hours", "hours")):
            cells = table.cells[column]
            on_cpu = any("on CPU" in note for note in table.notes)
            bars: dict[str, list[float | None]] = {
                "ours": [
                    cell.ours.score if isinstance(cell.ours, Estimate) else None for cell in cells.values()
                ],
                "paper (8 x A800)": [_printed(cell) for cell in cells.values()],
            }
            panels.append(
                (
                    f"{column.split('_')[0]}, {size}",
                    f"{unit} (ours: on CPU)" if on_cpu else unit,
                    list(cells),
                    bars,
                )
            )
        table.pictures.append("figure_4.png")
    figures.costs(
        panels,
        out / "figure_4.png",
        _titled("Memory and time of training", filled["figure_4_64k"], filled["figure_4_32k"]),
    )


def _printed(cell: Cell) -> float:
    assert cell.paper is not None  # what is drawn beside ours is printed in every row
    return float(cell.paper)


def _interval(ours: Estimate | Missing) -> dict | None:
    return {"mean": ours.score, "low": ours.low, "high": ours.high} if isinstance(ours, Estimate) else None


def _titled(title: str, *tables: Filled) -> str:
    run = any(
        isinstance(cell.ours, Estimate)
        for table in tables
        for column in table.cells.values()
        for cell in column.values()
    )
    return title if run else f"{title}\n(ours: not run)"
