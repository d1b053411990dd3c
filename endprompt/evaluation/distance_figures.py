"""Pictures of the task distance: keys found and their loss by distance, over what training rows showed."""

from pathlib import Path
from typing import Any

from endprompt.evaluation import figures

FOUND, LOSS = "C0", "C3"
WIDE = 4
SEEN, UNSEEN = "#dcefdc", "0.88"


def middle(cell: dict) -> float:
    """Where a cell stands on the axis of distances: in the middle of those between its questions and keys."""
    least, most = cell["between"]
    return (least + most) / 2


def _shade(axis, spans: list[list[int]], colour: str) -> None:
    axis.broken_barh(  # one collection however many spans there are
        [(low, high + 1 - low) for low, high in spans],
        (0, 1),
        transform=axis.get_xaxis_transform(),
        color=colour,
        linewidth=0,
    )


def _line(axis, cells: list[dict], keys: tuple[str, str, str], colour: str, name: str | None = None):
    value, low, high = ([cell[key] for cell in cells] for key in keys)
    down = [max(0.0, middle - end) for middle, end in zip(value, low, strict=True)]
    up = [max(0.0, end - middle) for middle, end in zip(value, high, strict=True)]
    style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2, "capsize": 2}
    axis.errorbar([middle(cell) for cell in cells], value, [down, up], color=colour, label=name, **style)


def panels(results: dict[str, dict], path: Path, title: str | None = None) -> None:
    """Draws, in a column for each name, keys found (above) and their loss (below) of a result's "scores" by
    distance, with intervals, into one PNG, WIDE columns to a row; green: distances that training rows showed,
    grey: those that they did not.
    """
    wide, tall = min(WIDE, len(results)), -(-len(results) // WIDE)
    figure, axes = figures._pyplot().subplots(
        2 * tall,
        wide,
        figsize=(1.4 + 3.2 * wide, 0.8 + 4.4 * tall),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    places = [axes[2 * row : 2 * row + 2, column] for row in range(tall) for column in range(wide)]
    for unused in places[len(results) :]:
        for axis in unused:
            axis.set_axis_off()
    ceiling = 1.05 * max(cell["nats_high"] for scores in results.values() for cell in scores["cells"])
    for (above, below), (name, scores) in zip(places, results.items(), strict=False):
        shown = scores["coverage"]
        for axis in (above, below):
            _shade(axis, shown["supervised"] or [], SEEN)
            _shade(axis, shown["gap"] or [], UNSEEN)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        _line(above, scores["cells"], ("score", "low", "high"), FOUND)
        _line(below, scores["cells"], ("nats", "nats_low", "nats_high"), LOSS)
        above.set_ylim(-3, 103)
        below.set_ylim(0, ceiling or 1)
        above.set_title(name, fontsize=9)
    for row in range(tall):
        axes[2 * row, 0].set_ylabel("keys found in %", fontsize=9)
        axes[2 * row + 1, 0].set_ylabel("nats a token of the key", fontsize=9)
    any_known = any(scores["coverage"]["supervised"] is not None for scores in results.values())
    shading = " (green: training rows showed it, grey: they did not)" if any_known else ""
    figure.supxlabel(f"distance between question and key in positions{shading}", fontsize=9)
    figures._save(figure, path, title)


def overlay(results: dict[str, dict], path: Path, title: str | None = None) -> None:
    """Draws keys found (left) and their loss (right) of several results' "scores" by distance, a line each,
    and under them, where rows are known, a strip for each name: coloured where its rows showed the distance.
    """
    known = {name: spans for name in results if (spans := results[name]["coverage"]["supervised"])}
    strip = 0.25 + 0.22 * len(known) if known else 0.01
    figure, axes = figures._pyplot().subplots(
        2, 2, figsize=(12, 4.2 + strip), sharex=True, height_ratios=[4.2, strip], layout="constrained"
    )
    colours = figures._colours(list(results))
    for column, keys in enumerate((("score", "low", "high"), ("nats", "nats_low", "nats_high"))):
        above, below = axes[:, column]
        for name, scores in results.items():
            _line(above, scores["cells"], keys, colours[name], name)
        for row, (name, spans) in enumerate(known.items()):
            bars = [(low, high + 1 - low) for low, high in spans]
            below.broken_barh(bars, (row - 0.4, 0.8), color=colours[name], linewidth=0)
        above.grid(alpha=0.3)
        above.tick_params(labelsize=8)
        below.set_yticks(range(len(known)), known, fontsize=7)
        below.set_ylim(len(known) - 0.4, -0.6)
        below.tick_params(axis="x", labelsize=8)
        below.set_visible(bool(known))
        if not known:
            above.tick_params(labelbottom=True)
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 1].set_ylim(0, None)
    axes[0, 0].set_ylabel("keys found in %", fontsize=9)
    axes[0, 1].set_ylabel("nats a token of the key", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    shown = " (strips: training rows showed it)" if known else ""
    figure.supxlabel(f"distance between question and key in positions{shown}", fontsize=9)
    figures._save(figure, path, title)
