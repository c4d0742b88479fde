"""One choice for every projection so that the summed loss is small within the budget of every stage.

What a choice costs is the caller's business: parameters (allocation.py) or bytes (bit_allocation.py). Lagrangian
relaxation over one price a stage, then a greedy repair and a greedy fill. Budgets are never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flrc_runtime.manifest import Storage

ASCENT = 200  # steps of the search for prices of several stages
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to store a projection.

    Args:
        ranks: Rank at every stage, or None at every stage.
        cost: What each stage reads of it, in the unit of the budgets.
        loss: In any unit common to all choices; of all stages together.
        storage: How factors are stored.
        formats: Number format of every stored matrix; empty for floats.
    """

    ranks: tuple[int | None, ...]
    cost: tuple[float, ...]
    loss: float
    storage: Storage = "plain"
    formats: tuple[str, ...] = ()


def solve(choices: Sequence[Sequence[Choice]], budgets: Array) -> list[Choice]:
    """Return one choice for every projection.

    Args:
        choices: Of every projection.
        budgets: Most that the sum of costs may be, one a stage. The cheapest choices must be within them.
    """
    options = _Options(choices)
    price = _relax(options, budgets)
    chosen = _fill(options, _repair(options, budgets, price), budgets)
    return [row[i] for row, i in zip(choices, chosen, strict=True)]


class _Options:
    """All choices of all projections as padded arrays ``cost: [P, O, S]`` and ``loss: [P, O]``."""

    def __init__(self, choices: Sequence[Sequence[Choice]]) -> None:
        width = max(len(row) for row in choices)
        self.cost = np.full((len(choices), width, len(choices[0][0].cost)), np.inf)
        self.loss = np.full((len(choices), width), np.inf)
        for p, row in enumerate(choices):
            self.cost[p, : len(row)] = [c.cost for c in row]
            self.loss[p, : len(row)] = [c.loss for c in row]
        self.finite_cost = np.where(np.isfinite(self.cost), self.cost, 0)
        self.rows = np.arange(len(choices))
        # Equal exchanges are made spread over the layers, not from the first layer on.
        self.spread = np.argsort((self.rows * 0.6180339887498949) % 1.0)

    def best(self, price: Array) -> NDArray[np.intp]:
        """The choice of every projection when a parameter activated at stage s costs ``price[s]``."""
        return np.asarray((self.loss + self.finite_cost @ price).argmin(axis=1))

    def bound(self, price: Array, budgets: Array) -> float:
        """No plan within the budgets has less loss than this, whatever the price."""
        return float((self.loss + self.finite_cost @ price).min(axis=1).sum() - price @ budgets)

    def spent(self, price: Array) -> Array:
        return self._sum(self.best(price))

    def _sum(self, choice: NDArray[np.intp]) -> Array:
        return np.asarray(self.cost[self.rows, choice].sum(axis=0))


def _relax(options: _Options, budgets: Array) -> Array:
    """Lagrangian relaxation: return the prices (loss a unit of cost, one a stage) that meet the budgets best."""
    losses = options.loss[np.isfinite(options.loss)]
    top = max(float(losses.max() - losses.min()), 1e-30)  # no exchange of loss for one parameter is dearer
    price = _prices(options, budgets, top)
    if len(budgets) > 1:
        price = _ascend(options, budgets, np.maximum(price, top * 1e-18))
    return price


def _prices(options: _Options, budgets: Array, top: float) -> Array:
    """Raise and lower one stage's price at a time until its budget is just met."""
    stages = len(budgets)
    price = np.zeros(stages)
    for _ in range(1 if stages == 1 else 3):
        before = price.copy()
        for s in range(stages):
            low, high = 0.0, top
            price[s] = low
            if options.spent(price)[s] <= budgets[s]:
                continue
            for _ in range(60):
                # Geometric: prices span many decades.
                price[s] = middle = max(low, high * 1e-18) ** 0.5 * high**0.5
                if options.spent(price)[s] > budgets[s]:
                    low = middle
                else:
                    high = middle
            price[s] = high
        if np.allclose(price, before, rtol=1e-6, atol=0):
            break
    return price


def _ascend(options: _Options, budgets: Array, price: Array) -> Array:
    """Move all prices towards the largest lower bound of the loss, where one price at a time gets stuck.

    A stage that spends more than its budget becomes dearer, one that spends less cheaper, in ever smaller steps.
    """
    best, bound = price, options.bound(price, budgets)
    for k in range(ASCENT):
        price = price * np.clip(options.spent(price) / budgets, 0.5, 2.0) ** (20 / (20 + k))
        value = options.bound(price, budgets)
        if value > bound:
            best, bound = price, value
    return best


def _repair(options: _Options, budgets: Array, price: Array) -> NDArray[np.intp]:
    """Take the best choices at ``price`` and, while a budget is exceeded, the exchange that mends most for least.

    Layers with equal curves change together at one price, so that no price need meet the budgets.
    """
    rows = options.rows
    priced = options.loss + options.finite_cost @ price
    choice = np.asarray(priced.argmin(axis=1))
    while True:
        cost = options.cost[rows, choice]
        spent = cost.sum(axis=0)
        if (spent <= budgets).all():
            return choice
        after = np.maximum(spent + options.cost - cost[:, None, :] - budgets, 0).sum(axis=2)
        relief = np.maximum(spent - budgets, 0).sum() - after
        loss = np.maximum(priced - priced[rows, choice][:, None], 0)
        rate = np.where(relief > 0, (loss + 1e-300) / np.where(relief > 0, relief, 1), np.inf)
        best = rate.min(axis=1)
        p = int(options.spread[best[options.spread].argmin()])
        choice[p] = int(rate[p].argmin())


def _fill(options: _Options, choice: NDArray[np.intp], budgets: Array) -> NDArray[np.intp]:
    """Spend what the relaxation left: the exchange with the largest gain per parameter that still fits, repeated."""
    choice = choice.copy()
    rows = options.rows
    while True:
        cost = options.cost[rows, choice]
        slack = budgets - cost.sum(axis=0)
        extra = options.cost - cost[:, None, :]
        gain = options.loss[rows, choice][:, None] - options.loss
        fits = (extra <= slack).all(axis=2) & (gain > 0)
        if not fits.any():
            return choice
        spend = np.where(fits, np.maximum(np.where(np.isfinite(extra), extra, 0).sum(axis=2), 1e-9), 1.0)
        rate = np.where(fits, np.where(np.isfinite(gain), gain, 0) / spend, 0.0)
        best = rate.max(axis=1)
        p = int(options.spread[best[options.spread].argmax()])
        choice[p] = int(rate[p].argmax())
