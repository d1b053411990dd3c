"""Pictures of the task distance: keys found and their loss by distance, over what training rows showed."""

from pathlib import Path
from typing import Any

from endprompt.evaluation import figures

FOUND, LOSS = "C0", "C3"
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


def _line(axis, cells: list[dict], keys: tuple[str, str, str], colour: str):
    value, low, high = ([cell[key] for cell in cells] for key in keys)
    down = [max(0.0, middle - end) for middle, end in zip(value, low, strict=True)]
    up = [max(0.0, end - middle) for middle, end in zip(value, high, strict=True)]
    style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2, "capsize": 2}
    axis.errorbar([middle(cell) for cell in cells], value, [down, up], color=colour, **style)


def panels(results: dict[str, dict], path: Path, title: str | None = None) -> None:
    """Draws, in a column for each name, keys found (above) and their loss (below) of a result's "scores" by
    distance, with intervals, into one PNG; green: distances that training rows showed, grey: those that they
    did not.
    """
    figure, axes = figures._pyplot().subplots(
        2,
        len(results),
        figsize=(1.4 + 3.2 * len(results), 5.2),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for (above, below), (name, scores) in zip(axes.T, results.items(), strict=True):
        shown = scores["coverage"]
        for axis in (above, below):
            _shade(axis, shown["supervised"] or [], SEEN)
            _shade(axis, shown["gap"] or [], UNSEEN)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        _line(above, scores["cells"], ("score", "low", "high"), FOUND)
        _line(below, scores["cells"], ("nats", "nats_low", "nats_high"), LOSS)
        above.set_ylim(-3, 103)
        below.set_ylim(bottom=0)
        above.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("keys found in %", fontsize=9)
    axes[1, 0].set_ylabel("nats a token of the key", fontsize=9)
    any_known = any(scores["coverage"]["supervised"] is not None for scores in results.values())
    shading = " (green: training rows showed it, grey: they did not)" if any_known else ""
    figure.supxlabel(f"distance between question and key in positions{shading}", fontsize=9)
    figures._save(figure, path, title)
