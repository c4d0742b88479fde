"""Which rank every projection gets at every stage.

An allocator is a loss curve per projection; one solver spends the parameter budgets on all curves together. So
the rules that only differ in what they think a rank is worth (uniform, FLRA, loss spectrum) share the handling of
budgets, break-even, rank steps and nesting, and compare at equal parameters.

Storage forms: dense at every stage, or factored with ranks that fall over the stages, at most once
(two rank chunks a projection: more, smaller products cost more time than they save).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Factors, break_even
from flrc_runtime.manifest import ProjectionPlan, RankPlan

Allocator = Literal["spectrum", "fisher", "uniform"]
Score = Literal["gw2", "gw2-rms", "g2-sum", "g2-mean", "g2-rms"]
RANK_STEP = 32  # the quantization block, so that no block straddles two chunks
MOST_RANKS = 48  # candidates a projection; a wide one is searched in larger multiples of the step
Shapes = Mapping[str, tuple[int, int]]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What each choice for one projection is thought to cost.

    Args:
        name: Of the projection.
        shape: ``(m, n)``.
        ranks: Candidate ranks, rising, all below break-even; may be empty.
        losses: Loss of each rank, then of the dense matrix; falling, in any unit common to all curves.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    losses: tuple[float, ...]


def candidate_ranks(shape: tuple[int, int], step: int = RANK_STEP) -> tuple[int, ...]:
    """Return the multiples of ``step`` below break-even, at most 48 of them."""
    most = break_even(shape)
    stride = step * max(1, -(-most // (step * MOST_RANKS)))
    return tuple(range(stride, most + 1, stride))


def uniform_curves(shapes: Shapes, *, step: int = RANK_STEP) -> list[Curve]:
    """The same share of parameters everywhere: the optimum of ``Σ mn log(share)`` under a budget."""
    return [_log_curve(name, shape, weight=1.0, step=step) for name, shape in shapes.items()]


def fisher_curves(
    shapes: Shapes, moments: Mapping[str, Moments], *, score: Score = "gw2", step: int = RANK_STEP
) -> list[Curve]:
    """FLRA as read from the paper's abstract: rank in proportion to the Fisher score, clamped, the rest shared out.

    ``Σ (m + n) s log r`` under a budget of ``Σ r (m + n)`` is largest where ``r ∝ s``, also when some r are clamped.
    """
    scores = fisher_scores(shapes, moments, score=score)
    mean = float(np.mean([*scores.values()])) or 1.0
    return [
        _log_curve(name, (m, n), weight=scores[name] / mean * (m + n) / (m * n), step=step)
        for name, (m, n) in shapes.items()
    ]


def fisher_scores(
    shapes: Shapes, moments: Mapping[str, Moments], *, score: Score = "gw2"
) -> dict[str, float]:
    """Return one Fisher score a projection.

    Args:
        shapes: ``(m, n)`` by name.
        moments: Statistics by name.
        score: ``gw2`` Σ(G∘W)², ``gw2-rms`` its root mean square, ``g2-sum`` ΣG², ``g2-mean``, ``g2-rms``.

    Raises:
        UsageError: The score is unknown.
    """
    result = {}
    for name, (m, n) in shapes.items():
        g2, gw2 = moments[name].fisher_g2, moments[name].fisher_gw2
        values: dict[str, float] = {
            "gw2": gw2,
            "gw2-rms": float(np.sqrt(gw2 / (m * n))),
            "g2-sum": g2,
            "g2-mean": g2 / (m * n),
            "g2-rms": float(np.sqrt(g2 / (m * n))),
        }
        if score not in values:
            raise UsageError(f"score {score!r} is not one of {', '.join(get_args(Score))}")
        result[name] = values[score]
    return result


def spectrum_curves(factors: Mapping[str, Factors], *, step: int = RANK_STEP) -> list[Curve]:
    """The predicted growth of the token loss, from the spectrum of each projection."""
    curves = []
    for name, f in factors.items():
        shape = (f.U.shape[0], f.V.shape[1])
        ranks = candidate_ranks(shape, step)
        curves.append(Curve(name, shape, ranks, (*(f.loss(r) for r in ranks), 0.0)))
    return curves


def _log_curve(name: str, shape: tuple[int, int], *, weight: float, step: int) -> Curve:
    m, n = shape
    ranks = candidate_ranks(shape, step)
    shares = [r * (m + n) / (m * n) for r in ranks]
    return Curve(name, shape, ranks, (*(-weight * m * n * float(np.log(s)) for s in shares), 0.0))


def allocate(
    curves: Sequence[Curve],
    keep: Sequence[float],
    *,
    allocator: str,
    scores: Mapping[str, float] | None = None,
    stage_weights: Sequence[float] | None = None,
) -> RankPlan:
    """Choose storage form and ranks so that the summed loss over all stages is small within every stage's budget.

    Args:
        curves: One a projection, in model order.
        keep: Share of projection parameters each stage may activate, in (0, 1], falling.
        allocator: Recorded in the plan.
        scores: Recorded in the plan.
        stage_weights: Weight of each stage's loss (share of tokens it will decode); equal by default.

    Raises:
        UsageError: A keep is out of range, they do not fall, or the smallest plan is larger than a budget.
    """
    check_keep(keep)
    weights = np.ones(len(keep)) if stage_weights is None else np.asarray(stage_weights, float)
    options = _Options(curves, len(keep), weights)
    total = sum(m * n for m, n in (c.shape for c in curves))
    budgets = np.floor(np.asarray(keep) * total + 1e-6)
    least = options.least()
    if (least > budgets).any():
        stage = int(np.argmax(least > budgets))
        raise UsageError(
            f"keep {keep[stage]:g} is below {least[stage] / total:.3f}, the least that ranks of "
            f"{min((c.ranks[0] for c in curves if c.ranks), default=0)} allow",
            hint="ask for a larger keep or a smaller --rank-step",
        )
    choice = _fill(options, _relax(options, budgets), budgets)
    projections = tuple(
        ProjectionPlan(c.name, c.shape, options.ranks[p][choice[p]]) for p, c in enumerate(curves)
    )
    return RankPlan(allocator, tuple(float(k) for k in keep), projections, dict(scores or {}))


def check_keep(keep: Sequence[float]) -> None:
    """Check the keeps of the stages.

    Raises:
        UsageError: None is given, one is outside (0, 1], or they do not fall.
    """
    if not keep:
        raise UsageError("name at least one keep")
    for k in keep:
        if not 0 < k <= 1:
            raise UsageError(f"keep must lie in (0, 1], not {k:g}")
    if any(a <= b for a, b in pairwise(keep)):
        raise UsageError(
            f"the keep of each stage must be below the one before: {', '.join(f'{k:g}' for k in keep)}"
        )


class _Options:
    """All choices of all projections as padded arrays ``cost: [P, O, S]`` (parameters) and ``loss: [P, O]``."""

    def __init__(self, curves: Sequence[Curve], stages: int, weights: Array) -> None:
        self.ranks = [_forms(c.ranks, stages) for c in curves]
        width = max(len(r) for r in self.ranks)
        self.cost = np.full((len(curves), width, stages), np.inf)
        self.loss = np.full((len(curves), width), np.inf)
        for p, curve in enumerate(curves):
            m, n = curve.shape
            by_rank: dict[int | None, float] = dict(zip((*curve.ranks, None), curve.losses, strict=True))
            for o, form in enumerate(self.ranks[p]):
                self.cost[p, o] = [m * n if r is None else r * (m + n) for r in form]
                self.loss[p, o] = sum(w * by_rank[r] for w, r in zip(weights, form, strict=True))
        self.rows = np.arange(len(curves))

    def least(self) -> Array:
        """Smallest parameters of each stage over all choices."""
        return self._sum(self.cost.sum(axis=2).argmin(axis=1))

    def best(self, price: Array) -> NDArray[np.intp]:
        """The choice of every projection when a parameter activated at stage s costs ``price[s]``."""
        finite = np.where(np.isfinite(self.cost), self.cost, 0)
        return np.asarray((self.loss + finite @ price).argmin(axis=1))

    def spent(self, price: Array) -> Array:
        return self._sum(self.best(price))

    def _sum(self, choice: NDArray[np.intp]) -> Array:
        return np.asarray(self.cost[self.rows, choice].sum(axis=0))


def _forms(ranks: tuple[int, ...], stages: int) -> list[tuple[int | None, ...]]:
    """All nested rank sequences with at most one fall, and dense."""
    forms: list[tuple[int | None, ...]] = [(None,) * stages]
    for high in ranks:
        forms.append((high,) * stages)
        for fall in range(1, stages):
            forms.extend((high,) * fall + (low,) * (stages - fall) for low in ranks if low < high)
    return forms


def _relax(options: _Options, budgets: Array) -> NDArray[np.intp]:
    """Lagrangian relaxation: raise and lower one stage's price at a time until every budget is just met."""
    stages = len(budgets)
    losses = options.loss[np.isfinite(options.loss)]
    top = max(float(losses.max() - losses.min()), 1e-30)  # no exchange of loss for one parameter is dearer
    price = np.zeros(stages)
    for _ in range(1 if stages == 1 else 8):
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
    while (options.spent(price) > budgets).any():
        price = np.maximum(price, top * 1e-18) * 1.05
    return options.best(price)


def _fill(options: _Options, choice: NDArray[np.intp], budgets: Array) -> NDArray[np.intp]:
    """Spend what the relaxation left: the exchange with the largest gain per parameter that still fits, repeated."""
    choice = choice.copy()
    rows = options.rows
    # Equal gains are taken spread over the layers, not from the first layer on.
    spread = np.argsort((rows * 0.6180339887498949) % 1.0)
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
        p = int(spread[best[spread].argmax()])
        choice[p] = int(rate[p].argmax())
