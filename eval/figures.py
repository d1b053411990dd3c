"""Pictures of results: length x depth heatmaps, one panel a method, and accuracy against length, one line a method."""

import json
from pathlib import Path


def read(folder: Path) -> list[dict]:
    """The results in ``folder`` (one JSON file a length) of the model that was scored there last, by length."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    newest = max(results, key=lambda result: result["date"])["question"]["model"] if results else None
    return sorted((result for result in results if result["question"]["model"] == newest), key=lambda result: result["scores"]["length"])


def pool(seeds: list[list[dict]]) -> list[dict]:
    """Passkey results of several seeds as one, by length: the samples of a depth are added up."""
    pooled: dict[int, dict[float, dict]] = {}
    for row in (row for rows in seeds for row in rows):
        cells = pooled.setdefault(row["scores"]["length"], {})
        for cell in row["scores"]["cells"]:
            kept = cells.setdefault(cell["depth"], {"depth": cell["depth"], "correct": 0, "total": 0})
            kept["correct"] += cell["correct"]
            kept["total"] += cell["total"]
    result = []
    for length, cells in sorted(pooled.items()):
        correct, total = (sum(cell[key] for cell in cells.values()) for key in ("correct", "total"))
        result.append({"scores": {"length": length, "correct": correct, "total": total, "score": 100 * correct / total, "cells": list(cells.values())}})
    return result


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path, title: str | None) -> None:
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


def heatmaps(results: dict[str, list[dict]], path: Path, title: str | None = None) -> None:
    """Draws accuracy by length (across) and depth of the key (down) for each named list of passkey results, into one PNG."""
    import numpy as np

    tall = -(-len(results) // 5)
    wide = -(-len(results) // tall)
    figure, axes = _pyplot().subplots(tall, wide, figsize=(1.2 + 2.3 * wide, 0.4 + 3.2 * tall), squeeze=False, sharey=True, layout="constrained")
    for axis in list(axes.flat)[len(results):]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, results.items(), strict=False):
        depths = sorted({cell["depth"] for row in rows for cell in row["scores"]["cells"]})
        grid = np.full((len(depths), len(rows)), np.nan)
        for column, row in enumerate(rows):
            for cell in row["scores"]["cells"]:
                grid[depths.index(cell["depth"]), column] = cell["correct"] / cell["total"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(rows)), [f"{row['scores']['length']}\n{row['scores']['score']:.0f}%" for row in rows], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axis.set_title(name, fontsize=10)
    figure.supylabel("depth of the key", fontsize=9)
    figure.supxlabel("length in tokens, and accuracy over all depths", fontsize=9)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="keys found", shrink=0.9 / tall)
    _save(figure, path, title)


def lines(results: dict[str, dict[int, dict]], path: Path, title: str | None = None, unit: str = "keys found in %, with 95 % interval") -> None:
    """Draws, for each named {length: {"mean", "low", "high"}}, the mean with its interval as a bar against length, into one PNG."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 4), layout="constrained")
    every = sorted({length for cells in results.values() for length in cells})
    for number, (name, cells) in enumerate(results.items()):
        lengths, means = sorted(cells), [cells[length]["mean"] for length in sorted(cells)]
        bars = [[max(0.0, cells[length]["mean"] - cells[length]["low"]) for length in lengths], [max(0.0, cells[length]["high"] - cells[length]["mean"]) for length in lengths]]
        # Side by side, so that bars at the same length can be told apart.
        across = [length * 1.025 ** (number - (len(results) - 1) / 2) for length in lengths]
        axis.errorbar(across, means, bars, label=name, marker="os^Dvph<>"[number % 9], markersize=4, capsize=3, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, [str(length) for length in every])
    axis.minorticks_off()
    axis.set(ylim=(-3, 103), xlabel="length in tokens", ylabel=unit)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path, title)


def bars(rows: dict[str, dict[str, tuple[float | None, float | None]]], path: Path, unit: str, title: str | None = None) -> None:
    """Draws {row: {column: (ours, paper's)}} as one panel a column, a pair of bars a row, into one PNG; what is None has no bar and says so."""
    plt = _pyplot()
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    wide = min(3, len(columns))
    tall = -(-len(columns) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(1.5 + max(3.2, 0.62 * len(rows)) * wide, 0.6 + 3.1 * tall), squeeze=False, layout="constrained")
    for axis, column in zip(axes.flat, columns, strict=False):
        for number, (mine, printed) in enumerate(cells.get(column, (None, None)) for cells in rows.values()):
            for shift, value, colour, hatch in ((-0.2, mine, "tab:blue", None), (0.2, printed, "lightgrey", "//")):
                if value is not None:
                    axis.bar(number + shift, value, 0.38, color=colour, hatch=hatch, edgecolor="grey", linewidth=0.5)
                    axis.annotate(f"{value:.3g}", (number + shift, value), ha="center", va="bottom", fontsize=6)
            if mine is None:
                axis.annotate("not run", (number - 0.2, 0), ha="center", va="bottom", fontsize=6, rotation=90, color="tab:blue")
        axis.set_xticks(range(len(rows)), list(rows), rotation=40, ha="right", fontsize=7)
        axis.set_title(column, fontsize=9)
        axis.margins(y=0.12)
        axis.set_xlim(-0.7, len(rows) - 0.3)
    for axis in list(axes.flat)[len(columns):]:
        axis.axis("off")
    from matplotlib.patches import Patch

    handles = [Patch(color="tab:blue", label="ours"), Patch(facecolor="lightgrey", edgecolor="grey", hatch="//", label="paper")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.supylabel(unit, fontsize=9)
    _save(figure, path, title)
