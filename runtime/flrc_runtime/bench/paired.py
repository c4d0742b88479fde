"""Medians with intervals from order statistics, and ratios of what was measured in the same turn.

Machines swing by a third within a minute: both times of a pair swing together, their ratio hardly.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

TAIL = (1 - 0.95) / 2


@dataclass(frozen=True)
class Median:
    """A median and its 95 % interval; fewer than six values have none."""

    value: float
    low: float | None
    high: float | None


def median(values: Iterable[float]) -> Median:
    """Return the median and the order statistics that enclose that of the distribution at least 95 times of 100.

    At most a share of (1 - 0.95) / 2 lies on either side, by the binomial distribution (Conover, Practical
    Nonparametric Statistics, 3.2), whatever is distributed; the values are taken as independent.
    """
    ordered = sorted(values)
    outside = _outside(len(ordered))
    value = statistics.median(ordered)
    return Median(value, ordered[outside - 1], ordered[-outside]) if outside else Median(value, None, None)


def _outside(count: int) -> int:
    """Return the largest k: that fewer than k of ``count`` values are below the median has a chance of at most TAIL."""
    below, chance = 0, 0.0
    while below < count:
        chance += comb(count, below) / 2**count  # of exactly so many
        if chance > TAIL:
            break
        below += 1
    return below


def ratios(times: Sequence[float], reference: Sequence[float]) -> Median:
    """Return the median of the ratios of times to those of the reference in the same turns."""
    return median(own / other for own, other in zip(times, reference, strict=True))
