"""Bootstrap 95 % percentile intervals (Efron and Tibshirani 1993, chapter 13).

The units that are drawn again, with replacement, are windows of a text or prompts. A statistic is written as a
function of how often each unit was drawn, so ratios, quantiles and paired differences are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flrc_edge.errors import UsageError

Weights = NDArray[np.float64]
Statistic = Callable[[Weights], float]  # how often each unit was drawn [units] -> value

LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; a single unit has no interval."""

    value: float
    low: float | None
    high: float | None


class Bootstrap:
    """Draws of one set of units, shared by all its statistics, so that differences between them are paired.

    Args:
        units: How many windows or prompts there are.
        resamples: How often all of them are drawn again.
        seed: Of the draws.

    Raises:
        UsageError: There is no unit, fewer than 100 resamples are asked for, or the seed is negative.
    """

    def __init__(self, units: int, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        if units < 1:
            raise UsageError(f"there must be at least one window or prompt, not {units}")
        if resamples < 100:
            raise UsageError(f"an interval needs at least 100 resamples, not {resamples}")
        if seed < 0:
            raise UsageError(f"the seed of the intervals must not be negative: {seed}")
        generator = np.random.default_rng(seed)
        self._draws = generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(float)
        self._once = np.ones(units)

    def estimate(self, statistic: Statistic) -> Estimate:
        """Return the value of a statistic and its interval."""
        value = statistic(self._once)
        if len(self._once) == 1:
            return Estimate(value, None, None)
        values = [statistic(weights) for weights in self._draws]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high))

    def difference(self, a: Statistic, b: Statistic) -> Estimate:
        """Return ``a - b``, both computed on the same draws: what windows or prompts have in common cancels."""
        return self.estimate(lambda weights: a(weights) - b(weights))


def ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, transform: Callable[[float], float] = float
) -> Statistic:
    """Return the statistic ``transform(Σ numerators / Σ denominators)``, both ``[units]``."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)

    def statistic(weights: Weights) -> float:
        return transform(float(weights @ above) / float(weights @ below))

    return statistic


def mean(values: ArrayLike) -> Statistic:
    """Return the mean over units, ``values: [units]``."""
    array = np.asarray(values, float)
    return ratio(array, np.ones(len(array)))


def pooled_mean(values: Sequence[NDArray[np.float64]]) -> Statistic:
    """Return the mean over all values of all units, one array a unit."""
    return ratio([v.sum() for v in values], [len(v) for v in values])


def pooled_quantile(values: Sequence[NDArray[np.float64]], q: float) -> Statistic:
    """Return the nearest-rank quantile over all values of all units, one array a unit.

    Args:
        values: One array a unit.
        q: In (0, 1); the result is the smallest value that at most a share of 1 - q exceeds.
    """
    everything = np.concatenate(values)
    order = np.argsort(-everything, kind="stable")
    unit = np.repeat(np.arange(len(values)), [len(v) for v in values])[order]
    falling = everything[order]
    counts = np.array([len(v) for v in values], float)
    # A draw moves the quantile by little: the head of the list nearly always holds it.
    head = min(len(falling), math.ceil(5 * (1 - q) * len(falling)) + 64)

    def statistic(weights: Weights) -> float:
        above = (1 - q) * float(weights @ counts) + 1e-9
        for end in (head, len(falling)):
            passed = np.cumsum(weights[unit[:end]])
            if passed[-1] > above:
                break
        return float(falling[int(np.searchsorted(passed, above, side="right"))])

    return statistic
