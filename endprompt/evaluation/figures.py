"""Pictures of results: length x depth heatmaps, scores against length, by distance and over steps, clusters
of bars, memory and time; the paper's figures dashed or hatched beside ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endprompt import methods

PALETTE = [*(f"C{number}" for number in range(10)), "black", "gold", "deeppink"]


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
        result.append(
            {
                "scores": {
                    "length": length,
                    "correct": correct,
                    "total": total,
                    "score": 100 * correct / total,
                    "cells": list(cells.values()),
                }
            }
        )
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
    """Draws accuracy by length (across) and depth of the key (down) for each named list of passkey results,
    into one PNG.
    """
    import numpy as np

    tall = -(-len(results) // 5)
    wide = -(-len(results) // tall)
    figure, axes = _pyplot().subplots(
        tall,
        wide,
        figsize=(1.2 + 2.3 * wide, 0.4 + 3.2 * tall),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in list(axes.flat)[len(results) :]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, results.items(), strict=False):
        depths = sorted({cell["depth"] for row in rows for cell in row["scores"]["cells"]})
        grid = np.full((len(depths), len(rows)), np.nan)
        for column, row in enumerate(rows):
            for cell in row["scores"]["cells"]:
                grid[depths.index(cell["depth"]), column] = cell["correct"] / cell["total"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(
            range(len(rows)),
            [f"{row['scores']['length']}\n{row['scores']['score']:.0f}%" for row in rows],
            fontsize=8,
        )
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axis.set_title(name, fontsize=10)
    figure.supylabel("depth of the key", fontsize=9)
    figure.supxlabel("length in tokens, and accuracy over all depths", fontsize=9)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="keys found", shrink=0.9 / tall)
    _save(figure, path, title)


def _colours(names: list[str]) -> dict[str, str]:
    """One colour a name: a method's own, the same in every picture; others those that are left, in order."""
    known = list(methods.METHODS)
    own = {name: PALETTE[known.index(name) % len(PALETTE)] for name in names if name in known}
    left = [colour for colour in PALETTE if colour not in own.values()] or PALETTE
    other = [name for name in names if name not in known]
    return own | {name: left[number % len(left)] for number, name in enumerate(other)}


def _bars(cells: list[dict]) -> list[list[float]]:
    """What ``errorbar`` takes: distances from the means down and up to the ends of the intervals."""
    return [
        [max(0.0, cell["mean"] - cell["low"]) for cell in cells],
        [max(0.0, cell["high"] - cell["mean"]) for cell in cells],
    ]


def lines(
    results: dict[str, dict[int, dict]],
    path: Path,
    title: str | None = None,
    label: str | tuple[str, str] = "keys found in %",
    limits: tuple[float, float] | None = (-3, 103),
    paper: dict[str, dict[int, float]] | None = None,
) -> None:
    """Draws, for each named {length: {"mean", "low", "high"}}, the mean with its interval as a bar against
    length, into one PNG.

    ``label``: of the vertical axis, or of it and of what stands in the place of lengths.  ``limits`` of the
    vertical axis; None: a logarithmic one.  ``paper``: printed figures by the same names, as dashed lines in
    the same colours.
    """
    paper = paper or {}
    label, across = (label, "length in tokens") if isinstance(label, str) else label
    names, every = (
        list(dict.fromkeys([*paper, *results])),
        sorted(set[int]().union(*results.values(), *paper.values())),
    )
    crowded, colours, drawn = len(results) + len(paper) > 5, _colours(names), []
    figure, axis = _pyplot().subplots(figsize=(8.4 if crowded else 6.4, 4), layout="constrained")
    for number, name in enumerate(names):
        style = _style(number, colours[name])
        cells, printed = results.get(name, {}), paper.get(name, {})
        if cells:
            drawn.append(_line(axis, name, cells, number - (len(names) - 1) / 2, style))
        if printed:
            drawn += axis.plot(
                sorted(printed),
                [printed[length] for length in sorted(printed)],
                label=f"{name} (paper)",
                linestyle="--",
                markerfacecolor="white",
                **style,
            )
    _scales(axis, every, limits)
    axis.set(xlabel=across, ylabel=f"{label}, with 95 % interval" if results else label)
    (
        figure.legend(handles=drawn, fontsize=8, loc="outside right upper")
        if crowded
        else axis.legend(handles=drawn, fontsize=8)
    )
    _save(figure, path, title)


def _style(number: int, colour: str) -> dict[str, Any]:
    return {"marker": "os^Dvph<>"[number % 9], "markersize": 4, "linewidth": 1.2, "color": colour}


def _line(axis, name: str, cells: dict[int, dict], aside: float, style: dict[str, Any]):
    """aside: so many steps beside its length, so that bars at the same length can be told apart."""
    shown = [cells[length] for length in sorted(cells)]
    places = [length * 1.025**aside for length in sorted(cells)]
    return axis.errorbar(
        places, [cell["mean"] for cell in shown], _bars(shown), label=name, capsize=3, **style
    )


def _grid(count: int, margin: float, width: float, height: float):
    """(figure, as many axes), up to four to a row, all of one scale; sizes in inches."""
    wide = min(4, count)
    tall = -(-count // wide)
    figure, axes = _pyplot().subplots(
        tall,
        wide,
        figsize=(margin + width * wide, 0.8 + height * tall),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def panels(
    results: dict[str, dict[str, dict[int, dict]]],
    path: Path,
    title: str | None = None,
    label: str = "keys found in %",
) -> None:
    """Draws what ``lines`` does for each heading of ``results``, in a panel of its own, up to four to a row,
    with one legend for all, into one PNG.
    """
    names = list(dict.fromkeys(name for lines in results.values() for name in lines))
    lengths = sorted({length for lines in results.values() for cells in lines.values() for length in cells})
    figure, axes = _grid(len(results), 2.4, 2.6, 2.4)
    colours = _colours(names)
    drawn: dict[str, Any] = {}
    for axis, (heading, lines) in zip(axes, results.items(), strict=True):
        for number, (name, cells) in enumerate(lines.items()):
            style = _style(names.index(name), colours[name])
            drawn[name] = _line(axis, name, cells, number - (len(lines) - 1) / 2, style)
        _scales(axis, lengths, (-3, 103))
        axis.tick_params(labelsize=8)
        axis.set_title(heading, fontsize=9)
    figure.supxlabel("length in tokens", fontsize=9)
    figure.supylabel(f"{label}, with 95 % interval", fontsize=9)
    figure.legend(handles=[drawn[name] for name in names], fontsize=8, loc="outside right upper")
    _save(figure, path, title)


def _scales(axis, lengths: list[int], limits: tuple[float, float] | None) -> None:
    """Lengths across on a logarithmic scale; up, the ``limits``, or a logarithmic scale if there are none."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    if limits:
        axis.set_ylim(*limits)
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(_pyplot().matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)


def curves(panels: dict[str, dict[str, dict[int, dict]]], path: Path, title: str | None = None) -> None:
    """Draws, for each heading of ``panels``, the mean of every named {step: {"mean", "low", "high"}} as a
    line and from low to high as a band, into one PNG.
    """
    colours = _colours(list(dict.fromkeys(name for series in panels.values() for name in series)))
    figure, axes = _pyplot().subplots(
        1, len(panels), figsize=(2.2 + 4 * len(panels), 4), squeeze=False, layout="constrained"
    )
    drawn = {}
    for axis, (heading, series) in zip(axes.flat, panels.items(), strict=True):
        for name, cells in series.items():
            steps = sorted(cells)
            axis.fill_between(
                steps,
                [cells[step]["low"] for step in steps],
                [cells[step]["high"] for step in steps],
                color=colours[name],
                alpha=0.2,
                linewidth=0,
            )
            (drawn[name],) = axis.plot(
                steps, [cells[step]["mean"] for step in steps], color=colours[name], linewidth=1.2, label=name
            )
        axis.set_title(heading, fontsize=10)
        axis.set(xlabel="step", ylabel="nats a token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(handles=list(drawn.values()), fontsize=8, loc="outside right upper")
    _save(figure, path, title)


def distances(
    results: Mapping[str, tuple[Mapping[float, dict], list[tuple[int, int]]]],
    path: Path,
    title: str | None = None,
) -> None:
    """Draws, in a panel for each name, the keys found by distance between question and key, {distance:
    {"mean", "low", "high"}}, and the spans of distances that its training rows never showed in grey, into one
    PNG.
    """
    figure, axes = _grid(len(results), 1.0, 2.7, 2.2)
    for axis, (name, (cells, never)) in zip(axes, results.items(), strict=True):
        axis.broken_barh(
            [(low, high + 1 - low) for low, high in never],
            (0, 1),
            transform=axis.get_xaxis_transform(),
            color="0.85",
            linewidth=0,
        )
        shown = [cells[distance] for distance in sorted(cells)]
        axis.errorbar(
            sorted(cells),
            [cell["mean"] for cell in shown],
            _bars(shown),
            marker="o",
            markersize=3,
            linewidth=1.2,
            capsize=2,
            color="C0",
        )
        axis.set_ylim(-3, 103)
        axis.tick_params(labelsize=8)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("distance between question and key in tokens (grey: never seen in training)", fontsize=9)
    figure.supylabel("keys found in %, with 95 % interval", fontsize=9)
    _save(figure, path, title)


def bars(
    groups: list[str],
    results: dict[str, list[dict | None]],
    path: Path,
    title: str | None = None,
    paper: dict[str, list[float | None]] | None = None,
    label: str = "score in %",
) -> None:
    """Draws a cluster of bars for each of ``groups``: per name its {"mean", "low", "high"} with the interval,
    and hatched beside it what ``paper`` prints.

    None in a list is a bar that is not there.
    """
    paper = paper or {}
    names = list(dict.fromkeys([*paper, *results]))
    colours = _colours(names)
    series = [
        (name, hatched)
        for name in names
        for hatched, source in ((False, results), (True, paper))
        if any(cell is not None for cell in source.get(name, []))
    ]
    figure, axis = _pyplot().subplots(
        figsize=(min(16, max(6.4, 1.6 + 0.24 * len(groups) * max(3, len(series)))) + 1.8, 4.2),
        layout="constrained",
    )
    width = 0.84 / max(1, len(series))
    for number, (name, hatched) in enumerate(series):
        cells: list = (paper if hatched else results)[name]
        there = [index for index, cell in enumerate(cells) if cell is not None]
        across = [index + (number - (len(series) - 1) / 2) * width for index in there]
        style = {
            "color": colours[name],
            "label": f"{name} (paper)" if hatched else name,
            "width": width * 0.94,
        }
        if hatched:
            axis.bar(
                across, [cells[index] for index in there], alpha=0.45, hatch="///", edgecolor="white", **style
            )
        else:
            shown = [cells[index] for index in there]
            axis.bar(
                across,
                [cell["mean"] for cell in shown],
                yerr=_bars(shown),
                capsize=2,
                error_kw={"linewidth": 0.9},
                **style,
            )
    axis.set_xticks(range(len(groups)), groups, fontsize=9)
    axis.set(
        ylabel=f"{label}, with 95 % interval" if any(not hatched for _, hatched in series) else label,
        ylim=(0, None),
    )
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path, title)


def costs(
    panels: list[tuple[str, str, list[str], dict[str, list[float | None]]]],
    path: Path,
    title: str | None = None,
) -> None:
    """Draws panels, two to a row, each (title, unit, names of the bars, {series: a value a bar or None}),
    every bar with its value above it.
    """
    rows = -(-len(panels) // 2)
    figure, axes = _pyplot().subplots(
        rows,
        2,
        figsize=(2.6 + 1.35 * max(len(names) for _, _, names, _ in panels) * 2, 0.6 + 3.1 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    labels: dict[str, Any] = {}
    for axis, (heading, unit, names, series) in zip(axes.flat, panels, strict=False):
        width = 0.8 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            there = [index for index, value in enumerate(values) if value is not None]
            printed = name.startswith("paper")
            drawn = axis.bar(
                [index + (number - (len(series) - 1) / 2) * width for index in there],
                [values[index] for index in there],
                width * 0.94,
                label=name,
                color="C7" if printed else "C0",
                hatch="///" if printed else None,
                edgecolor="white" if printed else None,
            )
            axis.bar_label(drawn, [f"{values[index]:.3g}" for index in there], fontsize=8, padding=1)
            labels.setdefault(name, drawn)
            for index in set(range(len(names))) - set(there):
                axis.annotate(
                    "not run",
                    (index + (number - (len(series) - 1) / 2) * width, 0),
                    (0, 2),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    fontsize=7,
                    color="C7",
                )
        axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
        axis.set_title(heading, fontsize=10)
        axis.set_ylabel(unit, fontsize=9)
        axis.margins(y=0.15)
        axis.set_xlim(-0.6, len(names) - 0.4)
    figure.legend(labels.values(), labels.keys(), fontsize=8, loc="outside lower center", ncols=len(labels))
    _save(figure, path, title)
