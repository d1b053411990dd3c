"""95 % intervals: of a proportion, of a mean over samples, of a mean over seeds."""

import math

import numpy as np
from scipy import stats


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927), as (low, high)."""
    interval = stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return max(0.0, float(interval.low)), min(1.0, float(interval.high))


def bootstrap(
    values: list[float], weights: list[float] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval (Efron, 1979) of the mean of ``values``, weighted by ``weights``, over
    ``resamples`` draws of samples.

    Samples that are all alike have no spread to draw from; where they are all 0 or all 100 percent the Wilson
    interval stands in its place.
    """
    found, shares = (
        np.asarray(values, float),
        np.ones(len(values)) if weights is None else np.asarray(weights, float),
    )
    if found.min() == found.max():
        if weights is None and found[0] in (0, 100):
            low, high = wilson(len(values) if found[0] else 0, len(values))
            return 100 * low, 100 * high
        return float(found[0]), float(found[0])
    drawn = stats.bootstrap(
        (found, shares),
        lambda x, w, axis=-1: (x * w).sum(axis) / w.sum(axis),
        paired=True,
        n_resamples=resamples,
        batch=200,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def over_seeds(
    values: list[float], alone: tuple[float, float], floor: float = 0.0, ceiling: float = math.inf
) -> dict:
    """{"mean", "low", "high", "seeds", "interval"} of one value a seed: Student's t over the seeds, cut to
    [floor, ceiling].

    ``alone``: the interval of a seed's own samples.  It stands, named "samples", for a single seed and for
    seeds that do not differ at
    all: no spread says that the seeds agree, not that the value is known exactly.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or max(values) == min(values):
        return {"mean": mean, "low": alone[0], "high": alone[1], "seeds": len(values), "interval": "samples"}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {
        "mean": mean,
        "low": max(floor, mean - half),
        "high": min(ceiling, mean + half),
        "seeds": len(values),
        "interval": "t",
    }
