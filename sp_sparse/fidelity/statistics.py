"""Means and paired differences with bootstrap intervals, and the density that gives equal quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# (prompt, seed) -> a figure of that video
Values = Mapping[tuple[str, int], float]

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over videos.

    Attributes:
        mean: of the videos; infinite if one is.
        low, high: ends of the interval; None with fewer than two prompts or infinite values.
        count: videos.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def estimate(values: Values) -> Estimate | None:
    """The mean and its interval by a cluster bootstrap (percentile method, 10,000 resamples, 95 %); None without values.

    Prompts are drawn with replacement, each with all its seeds: videos of one prompt are not independent. The same values
    give the same interval.
    """
    if not values:
        return None
    prompts = sorted({prompt for prompt, _ in values})
    number = {prompt: i for i, prompt in enumerate(prompts)}
    sums, counts = np.zeros(len(prompts)), np.zeros(len(prompts))
    for (prompt, _), value in sorted(values.items()):
        sums[number[prompt]] += value
        counts[number[prompt]] += 1
    mean = float(sums.sum() / counts.sum())
    if len(prompts) < 2 or not math.isfinite(mean):
        return Estimate(mean, None, None, len(values))
    low, high = _interval(sums, counts)
    return Estimate(mean, low, high, len(values))


def paired(values: Values, baseline: Values) -> Values:
    """What each video has more than that of the same prompt and seed in `baseline`; only where both are, and finite."""
    both = {place: (value, baseline[place]) for place, value in values.items() if place in baseline}
    return {place: a - b for place, (a, b) in both.items() if math.isfinite(a) and math.isfinite(b)}


def density_for(quality: float, curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Between which densities the lowest one lies from which on a curve is at least so good.

    Both are the same where it is interpolated, linearly between two points; (0, lowest) where the whole curve is better,
    (highest, 1) where its end is worse.

    Args:
        quality: what is to be reached.
        curve: (density, quality) points, at least one.
    """
    points = sorted(curve)
    if points[-1][1] < quality:
        return points[-1][0], 1.0
    for (density, value), (next_density, next_value) in reversed(list(zip(points[:-1], points[1:], strict=True))):
        if value < quality:
            # From an infinite end on nothing can be interpolated.
            share = (quality - value) / (next_value - value) if math.isfinite(next_value) else 1.0
            needed = density + share * (next_density - density)
            return needed, needed
    return (points[0][0],) * 2 if points[0][1] == quality else (0.0, points[0][0])


def _interval(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    draws = _draws(len(sums))
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(clusters: int) -> NDArray[np.int64]:
    """How often each cluster is drawn in each resample, `[RESAMPLES, clusters]`: the same for all figures."""
    return np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)
