"""The cheapest way through segments on stages that only rise, under a budget: a constrained shortest path.

Handler and Zang, "A dual algorithm for the constrained shortest path problem", Networks 10 (1980): a Lagrangian
bound, then labels (spend, loss) of partial ways, without those that another label or the bound rules out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BEAMS = (16, 1024)  # labels a stage: a quick search, whose loss then bounds the exact one
PRICES = 32  # tried at once
ROUNDING = 1e-9  # relative; sums of the same floats in another order may differ by this

Floats = NDArray[np.float64]


def solve(loss: Floats, spend: Floats, move: Floats, *, budget: float) -> tuple[int, ...]:
    """Choose where each stage begins.

    Exact, unless at one segment more than 1024 ways to one stage are left, none better than another in both spend
    and loss. Then they are thinned evenly over spend: the result is within the budget, and further from the optimum
    by at most the duality gap.

    Args:
        loss: ``[segments, stages]``.
        spend: ``[segments, stages]``.
        move: ``[segments]``: spend of a move before that segment, over however many stages it goes.
        budget: Largest sum of spends. If none is that small, the least possible sum.

    Returns:
        The segment at which stage 1, 2, … begins, not falling; the number of segments for a stage never reached.
        Among equal losses that of the smallest spend.
    """
    least = completions(np.zeros_like(loss), spend, move, np.ones(1))[:, 0]  # (segments + 1, stages)
    budget = max(budget, float(least[0, 0])) + ROUNDING * float(np.abs(spend).sum(0).max())
    price = _best_price(loss, spend, move, budget)
    rest = completions(loss, spend, move, np.array([price]))[:, 0]
    rounding = ROUNDING * float(np.abs(loss).sum(0).max())
    bound = np.inf
    for beam in BEAMS:
        on = [_Labels.start(*loss.shape), *[_Labels.none(*loss.shape)] * (loss.shape[1] - 1)]
        for i in range(len(loss)):
            allowed = bound + rounding + price * budget - rest[i + 1]
            on = [
                labels.after(loss[i, s], spend[i, s])
                .within(budget - least[i + 1, s], price, allowed[s])
                .thinned(beam)
                for s, labels in enumerate(_moves(on, i, float(move[i])))
            ]
        best = on[0]
        for labels in on[1:]:
            best = best | labels
        bound = float(best.loss[-1])
    return tuple(best.begins[-1].tolist())


def completions(loss: Floats, spend: Floats, move: Floats, prices: Floats) -> Floats:
    """Return the least ``loss + price · spend`` of what is left, by segment, price and the stage one comes from.

    Returns:
        ``[segments + 1, prices, stages]``, the segment and a move before it included.
    """
    segments, stages = loss.shape
    result = np.zeros((segments + 1, len(prices), stages))
    price = prices[:, None]
    for i in reversed(range(segments)):
        on = loss[i] + price * spend[i] + result[i + 1]  # (prices, stages)
        later = np.minimum.accumulate(on[:, ::-1], axis=1)[:, ::-1]
        result[i] = on
        result[i, :, :-1] = np.minimum(on[:, :-1], later[:, 1:] + price * move[i])
    return result


def _best_price(loss: Floats, spend: Floats, move: Floats, budget: float) -> float:
    """Return the price of spend whose Lagrangian bound ``min(loss + price · spend) - price · budget`` is largest."""
    span = float(np.ptp(spend.sum(0)))
    if span == 0.0:
        return 0.0
    scale = float(np.ptp(loss.sum(0)) + np.abs(loss).max()) / span
    prices = np.append(0.0, scale * np.logspace(-4, 4, PRICES - 1))
    price = 0.0
    for _ in range(3):
        bounds = completions(loss, spend, move, prices)[0, :, 0] - prices * budget
        top = int(bounds.argmax())
        price = float(prices[top])
        prices = np.linspace(prices[max(top - 1, 0)], prices[min(top + 1, PRICES - 1)], PRICES)
    return price


@dataclass(frozen=True)
class _Labels:
    """Partial ways that are on one stage, by growing spend and falling loss; ``begins`` holds one row each."""

    spend: Floats
    loss: Floats
    begins: NDArray[np.int64]

    @classmethod
    def start(cls, segments: int, stages: int) -> _Labels:
        """Return the one way that has nothing behind it."""
        return cls(np.zeros(1), np.zeros(1), np.full((1, stages - 1), segments))

    @classmethod
    def none(cls, segments: int, stages: int) -> _Labels:
        """Return no way at all."""
        return cls(np.zeros(0), np.zeros(0), np.full((0, stages - 1), segments))

    def __or__(self, other: _Labels) -> _Labels:
        """Return the ways of both that no other one beats; of equals, that of ``self``."""
        if not len(other.spend):
            return self
        if not len(self.spend):
            return other
        spend, loss = np.concatenate([self.spend, other.spend]), np.concatenate([self.loss, other.loss])
        order = np.lexsort((loss, spend))
        least = np.minimum.accumulate(loss[order])
        order = order[np.append(True, least[1:] < least[:-1])]
        return _Labels(spend[order], loss[order], np.concatenate([self.begins, other.begins])[order])

    def __getitem__(self, which: NDArray[np.bool_]) -> _Labels:
        return self if which.all() else _Labels(self.spend[which], self.loss[which], self.begins[which])

    def after(self, loss: float, spend: float) -> _Labels:
        """Return the ways one segment further."""
        return _Labels(self.spend + spend, self.loss + loss, self.begins)

    def begin(self, stage: int, segment: int) -> _Labels:
        """Return the ways with ``stage`` beginning at ``segment``."""
        begins = self.begins.copy()
        begins[:, stage - 1] = segment
        return _Labels(self.spend, self.loss, begins)

    def within(self, spend: float, price: float, reduced: float) -> _Labels:
        """Return the ways of at most that spend and that ``loss + price · spend``."""
        return self[(self.spend <= spend) & (self.loss + price * self.spend <= reduced)]

    def thinned(self, most: int) -> _Labels:
        """Return at most ``most`` of the ways: of equal ranges of spend, the one of least loss."""
        if len(self.spend) <= most:
            return self
        place = np.floor((self.spend - self.spend[0]) * (most - 1) / np.ptp(self.spend))
        return self[np.append(np.diff(place) > 0, True)]


def _moves(on: list[_Labels], segment: int, spend: float) -> list[_Labels]:
    """Return the ways on every stage once those that move before ``segment`` have done so."""
    result, leaving = [on[0]], on[0]
    for stage in range(1, len(on)):
        arriving = leaving.begin(stage, segment)
        result.append(on[stage] | arriving.after(0.0, spend))
        leaving = arriving | on[stage]
    return result
