"""Which relative distances rows supervise, and how often (paper Eq. 8-9).

A distance is query position minus key position, both in one row, key not after query.  Every such pair
counts, as in the paper, although the last token of a row predicts nothing.  A row is described by its
segments: its maximal runs of consecutive positions, as inclusive (first, last) pairs
(``positions.segments``).  L = target_length; distances are 0..L-1.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from endprompt.positions import plans

Span = tuple[int, int]  # both ends belong to it


def pair_counts(rows: Iterable[Sequence[Span]], L: int) -> np.ndarray:
    """Int64 [L]: how many query-key pairs of all ``rows`` (their segments) stand at each distance.  Raises
    ValueError if a row spans more than L.

    Between two segments the count is a trapezoid over the distance, within one a falling line.  Second
    differences of either are a few steps, so a row costs its pairs of segments, not of tokens.  A row of more
    such pairs than L costs a Fourier transform.
    """
    steps, scattered = np.zeros(L + 2, np.int64), np.zeros(L, np.int64)
    for parts, times in Counter(tuple(parts) for parts in rows).items():
        first, last = np.array(parts, np.int64).T
        if last[-1] - first[0] >= L:
            raise ValueError(f"positions {first[0]}..{last[-1]} span more than {L}")
        if _many(parts, L):
            scattered += times * _correlated(parts, L)
            continue
        sizes = last - first + 1
        steps[0] += times * sizes.sum()
        steps[1] -= times * (sizes + 1).sum()
        np.add.at(steps, sizes + 1, times)
        earlier, later = np.triu_indices(len(parts), 1)
        nearest = first[later] - last[earlier]
        np.add.at(steps, nearest, times)
        np.add.at(steps, nearest + sizes[earlier], -times)
        np.add.at(steps, nearest + sizes[later], -times)
        np.add.at(steps, nearest + sizes[earlier] + sizes[later], times)
    return np.cumsum(np.cumsum(steps))[:L] + scattered


def _many(parts: Sequence[Span], L: int) -> bool:
    """Whether a row has more pairs of segments than L."""
    return len(parts) * (len(parts) - 1) // 2 > L


def _correlated(parts: Sequence[Span], L: int) -> np.ndarray:
    """Int64 [L]: pairs of a row at each distance, which is how often its positions meet themselves when they
    are moved by it.  Counts are below 2^31, so rounding in float64 is exact."""
    taken = np.zeros(1 << (2 * L - 1).bit_length())
    for low, high in parts:
        taken[low - parts[0][0] : high - parts[0][0] + 1] = 1
    spectrum = np.fft.rfft(taken)
    return np.rint(np.fft.irfft(spectrum * spectrum.conj(), len(taken))[:L]).astype(np.int64)


def observed_distances(position_ids: np.ndarray) -> np.ndarray:
    """All distinct distances of one row with ``position_ids`` [T], sorted, int64."""
    return np.flatnonzero(
        pair_counts([plans.segments(position_ids)], int(position_ids[-1]) - int(position_ids[0]) + 1)
    )


def contributions(parts: Sequence[Span]) -> Iterator[tuple[Span, Span, Span]]:
    """(queries' segment, keys' segment, distances between them) for every pair of a row's segments, in closed
    form.

    A segment [p, q] shows 0..q-p to itself; two segments [p, q] and [r, s] with q < r show r-q..s-p.  For
    text 0..a-1 and a prompt L-b..L-1 these are the three parts of the paper's D_obs (Eq. 8).
    """
    return (
        ((r, s), (p, q), (0, s - r) if i == j else (r - q, s - p))
        for j, (r, s) in enumerate(parts)
        for i, (p, q) in enumerate(parts[: j + 1])
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The same numbers as disjoint spans in order, none touching the next."""
    merged: list[Span] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return merged


def observed(rows: Iterable[Sequence[Span]]) -> list[Span]:
    """D_obs of ``rows`` in closed form (paper Eq. 8), as disjoint spans in order; of a row of very many
    segments (``pair_counts``) as it is counted."""
    different = set(map(tuple, rows))
    longest = max((parts[-1][1] - parts[0][0] + 1 for parts in different), default=0)
    steps = np.zeros(longest + 1, np.int64)
    for parts in different:
        if _many(parts, longest):
            for low, high in counted(_correlated(parts, longest)):
                steps[low] += 1
                steps[high + 1] -= 1
            continue
        first, last = np.array(parts, np.int64).T
        earlier, later = np.triu_indices(len(parts), 1)
        steps[0] += 1
        steps[(last - first).max() + 1] -= 1
        np.add.at(steps, first[later] - last[earlier], 1)
        np.add.at(steps, last[later] - first[earlier] + 1, -1)
    return counted(np.cumsum(steps)[:longest])


def gap(spans: Sequence[Span], L: int) -> list[Span]:
    """D_gap (paper Eq. 9): what disjoint ``spans`` in order leave out of 0..L-1."""
    edges = [-1, *(edge for span in spans for edge in span), L]
    return [(low + 1, high - 1) for low, high in zip(edges[::2], edges[1::2], strict=True) if low + 1 < high]


def counted(counts: np.ndarray) -> list[Span]:
    """The distances with a positive count in ``counts`` [L], as disjoint spans in order."""
    seen = np.flatnonzero(counts)
    return plans.segments(seen) if len(seen) else []


def picture(panels: Sequence[tuple[str, np.ndarray, int]], title: str) -> bytes:
    """A PNG with one panel for each (name, counts [L], tokens counted): pairs per million tokens by distance,
    gaps in grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1 + 4 * columns, 0.8 + 2.5 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, counts, tokens) in zip(axes.flat, panels, strict=False):
        L = len(counts)
        edges = np.unique(np.linspace(0, L, min(L, 1024) + 1).astype(np.int64))
        heights = np.add.reduceat(counts, edges[:-1]) / np.diff(edges) * 1e6 / tokens
        axis.stairs(np.where(heights > 0, heights, np.nan), edges, baseline=None, color="C0", linewidth=1.2)
        # One collection however many gaps there are.
        axis.broken_barh(
            [(low, high + 1 - low) for low, high in gap(counted(counts), L)],
            (0, 1),
            transform=axis.get_xaxis_transform(),
            color="0.85",
            linewidth=0,
        )
        axis.set_yscale("log")
        axis.set_xlim(0, L)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{name}\nnever seen: {np.mean(counts == 0):.1%}", fontsize=9)
    figure.supxlabel("distance between query and key (grey: never seen)", fontsize=9)
    figure.supylabel("query-key pairs per million tokens", fontsize=9)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
