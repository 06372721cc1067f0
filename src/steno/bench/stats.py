"""Intervals at 95 % and medians: what a figure is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


@final
@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its 95 % interval; method: wilson, newcombe or bootstrap."""

    value: float
    low: float
    high: float
    method: str


def mean_interval(scores: Sequence[float]) -> Interval:
    """Mean of scores per instance: Wilson's interval where all are 0 or 1, else the bootstrap."""
    if _is_binary(scores):
        low, high = wilson(int(sum(scores)), len(scores))
        return Interval(value=sum(scores) / len(scores), low=low, high=high, method="wilson")
    return bootstrap(scores)


def difference_interval(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean of `scores - others`, paired: Newcombe's interval where all are 0 or 1, else the bootstrap of the differences."""
    if _is_binary(scores) and _is_binary(others):
        return newcombe(scores, others)
    return bootstrap([a - b for a, b in zip(scores, others, strict=True)])


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927)."""
    p, z2 = successes / trials, Z95**2
    middle = p + z2 / (2 * trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    # at the ends the formula is exact, its floating point is not
    low = 0.0 if successes == 0 else (middle - half) / scale
    return low, 1.0 if successes == trials else (middle + half) / scale


def newcombe(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Difference of two paired shares from their Wilson intervals (Newcombe 1998, Statist. Med. 17, method 10).

    Unlike a bootstrap it keeps a width where no pair differs.
    """
    pairs, n = list(zip(scores, others, strict=True)), len(scores)
    both = sum(x == 1 and y == 1 for x, y in pairs)
    neither = sum(x == 0 and y == 0 for x, y in pairs)
    first, second = sum(int(x) for x, _ in pairs), sum(int(y) for _, y in pairs)
    only_first, only_second = first - both, second - both
    p1, p2 = first / n, second / n
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    margins = first * (n - first) * second * (n - second)
    surplus = float(both * neither - only_first * only_second)
    if surplus > 0:
        surplus = max(surplus - n / 2, 0.0)
    phi = surplus / math.sqrt(margins) if margins else 0.0
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    value = p1 - p2
    return Interval(
        value=value,
        low=max(-1.0, value - math.sqrt(max(0.0, down))),
        high=min(1.0, value + math.sqrt(max(0.0, up))),
        method="newcombe",
    )


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and its percentile bootstrap over instances, 10,000 resamples (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("`values` must hold at least one value; got none.")
    rng = np.random.default_rng(seed)
    means = [data[rng.integers(0, len(data), (500, len(data)))].mean(1) for _ in range(RESAMPLES // 500)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    value = float(data.mean())
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)), method="bootstrap")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _is_binary(values: Sequence[float]) -> bool:
    return all(v in (0, 1) for v in values)
