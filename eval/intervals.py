"""Means over seeds with their 95 % intervals."""

import math


def central_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of ``degrees`` of freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def quantile(degrees: int, probability: float = 0.95) -> float:
    """The t with P(|T| <= t) = ``probability``.  Raises ValueError without a degree of freedom."""
    if degrees < 1:
        raise ValueError("Student's t needs at least one degree of freedom")
    low, high = 0.0, 1.0
    while central_probability(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle, degrees) < probability else (low, middle)
    return high


def over_seeds(values: list[float], alone: tuple[float, float], floor: float = 0.0, ceiling: float = math.inf) -> dict:
    """{"mean", "low", "high", "seeds", "interval"} of one value a seed: Student's t over the seeds, cut to [floor, ceiling].

    ``alone``: the interval of a seed's own samples.  It stands, named "samples", for a single seed and for seeds that do not differ at
    all: no spread says that the seeds agree, not that the value is known exactly.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or max(values) == min(values):
        return {"mean": mean, "low": alone[0], "high": alone[1], "seeds": len(values), "interval": "samples"}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return {"mean": mean, "low": max(floor, mean - half), "high": min(ceiling, mean + half), "seeds": len(values), "interval": "t"}
