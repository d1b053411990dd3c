"""The pictures of a run's report, as SVG."""

import base64
import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from endprompt.evaluation import figures, passkey
from endprompt.positions import coverage
from endprompt.recipe import task_names
from endprompt.reports.run_data import Coverage

COLOURS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#475569"]
GREY, LIGHT = "#64748b", "#e2e8f0"
GRIDS = (*passkey.TASKS, task_names.NAMED_KEYS)
PLAIN = {"svg.hashsalt": "endprompt"}
WIDTH = 11.4  # inches of the page, by which letters have one size in all pictures
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.titlesize": 10,
    "axes.titlecolor": "#0f172a",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    **PLAIN,
}
Far = tuple[dict[float, dict], list[tuple[int, int]]]  # cells by distance, spans that no row showed
Lines = dict[str, tuple[list[float], list[float]]]  # {label: (across, up)}


def colours(labels: list[str]) -> dict[str, str]:
    return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _name(label: str) -> str:
    """``label`` as matplotlib shows it: names of folders are no formulas."""
    return label.replace("$", r"\$")


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


@contextlib.contextmanager
def _any_script():
    """Inside, nothing is said of letters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def _drawn(draw: Callable[[Any], Any]) -> str:
    """The picture that ``draw`` makes with pyplot, as an address that holds it."""
    plt, buffer = _pyplot(), io.BytesIO()
    with plt.rc_context(STYLE), _any_script():
        figure = draw(plt)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return _uri(buffer.getvalue())


def _written(draw: Callable[[Path], None]) -> str:
    """The same of a picture that is drawn into a file."""
    with tempfile.TemporaryDirectory() as folder, _pyplot().rc_context(PLAIN), _any_script():
        path = Path(folder) / "picture.svg"
        draw(path)
        return _uri(path.read_bytes())


def over_steps(panels: dict[str, Lines], colour: dict[str, str]) -> str:
    """A panel for each {heading: lines} of what was logged over steps."""

    def draw(plt):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(min(4.9 * len(panels), WIDTH), 3.1), squeeze=False, layout="constrained"
        )
        for axis, (heading, lines) in zip(axes.flat, panels.items(), strict=True):
            for label, (across, up) in lines.items():
                few = {"marker": "o", "markersize": 3} if len(across) < 30 else {}
                axis.plot(across, up, color=colour[label], linewidth=1.6, **few)
            axis.set_title(heading)
            axis.set_xlabel("step")
            axis.grid(axis="x", visible=False)
            if min((min(up) for _, up in lines.values()), default=0) >= 0:
                axis.set_ylim(bottom=0)
        return figure

    return _drawn(draw)


def covered(named: dict[str, Coverage], colour: dict[str, str]) -> str:
    """Pairs a million tokens by distance, a panel a run; grey: distances that no row has."""

    def draw(plt):
        wide = min(3, len(named))
        tall = -(-len(named) // wide)
        figure, axes = plt.subplots(
            tall,
            wide,
            figsize=(max(6.0, 3.6 * wide), 0.4 + 2.5 * tall),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis in axes.flat[len(named) :]:
            axis.set_axis_off()
        for axis, (label, one) in zip(axes.flat, named.items(), strict=False):
            counts = one.counts
            L = len(counts)
            edges = np.unique(np.linspace(0, L, min(L, 512) + 1).astype(np.int64))
            heights = np.add.reduceat(counts, edges[:-1]) / np.diff(edges) * 1e6 / one.tokens
            axis.stairs(
                np.where(heights > 0, heights, np.nan),
                edges,
                baseline=None,
                color=colour[label],
                linewidth=1.6,
            )
            axis.broken_barh(
                [(low, high + 1 - low) for low, high in coverage.gap(coverage.counted(counts), L)],
                (0, 1),
                transform=axis.get_xaxis_transform(),
                color=LIGHT,
                linewidth=0,
            )
            axis.set_yscale("log")
            axis.set_xlim(0, L)
            axis.set_title(f"{_name(label)}: {one.never:.1%} never seen")
        figure.supxlabel("distance between query and key", fontsize=9, color="#334155")
        figure.supylabel("pairs a million tokens", fontsize=9, color="#334155")
        return figure

    return _drawn(draw)


def by_length(task: str, scores: dict[str, dict[int, dict]], colour: dict[str, str]) -> str:
    """{label: {length: scores of a result}} as lines with their intervals."""

    def draw(plt):
        figure, axis = plt.subplots(figsize=(3.7, 2.6), layout="constrained")
        for label, cells in scores.items():
            lengths = sorted(cells)
            shown = [cells[length] for length in lengths]
            means = [cell["score"] for cell in shown]
            ends = [
                [max(0.0, mean - cell["low"]) for mean, cell in zip(means, shown, strict=True)],
                [max(0.0, cell["high"] - mean) for mean, cell in zip(means, shown, strict=True)],
            ]
            axis.errorbar(
                lengths, means, ends, color=colour[label], marker="o", markersize=4, capsize=3, linewidth=1.6
            )
        every = sorted(set[int]().union(*scores.values()))
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            every, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in every]
        )
        axis.minorticks_off()
        if task == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        elif task != task_names.FAR_GAIN:
            axis.set_ylim(-3, 103)
        axis.set_title(_name(task))
        axis.set_xlabel("length in tokens")
        axis.set_ylabel(UNITS.get(task, "%"))
        return figure

    return _drawn(draw)


UNITS = {"perplexity": "perplexity", task_names.FAR_GAIN: "nats gained"}


def grid(named: dict[str, list[dict]]) -> str:
    """Keys found by length and depth, a panel for each name."""
    shown = {_name(label): rows for label, rows in named.items()}
    return _written(lambda path: figures.heatmaps(shown, path))


def far(named: dict[str, Far]) -> str:
    """Keys found by distance, a panel for each name."""
    shown = {_name(label): found for label, found in named.items()}
    return _written(lambda path: figures.distances(shown, path))
