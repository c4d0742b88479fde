"""Which rank every projection gets at every stage.

An allocator is a loss curve per projection; one solver spends the parameter budgets on all curves together. So
the rules that only differ in what they think a rank is worth (uniform, FLRA, loss spectrum) share the handling of
budgets, break-even, rank steps and nesting, and compare at equal parameters.

Storage forms: dense at every stage, or factored (plain or pivoted) with ranks that fall over the stages, at most
once (two rank chunks a projection: more, smaller products cost more time than they save). Pivoted, the larger rank
of two may be the full one: dense first, fewer ranks later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import Literal, get_args

import numpy as np

from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Factors
from flrc_edge.plan_solver import Choice, solve
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Storage, break_even, factor_parameters

Allocator = Literal["measured", "search", "spectrum", "fisher", "uniform"]
Score = Literal["gw2", "gw2-rms", "g2-sum", "g2-mean", "g2-rms"]
RANK_STEP = 32  # the quantization block, so that no block straddles two chunks
MOST_RANKS = 48  # candidates a projection; a wide one is searched in larger multiples of the step
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Curve:
    """What each choice for one projection is thought to cost.

    Args:
        name: Of the projection.
        shape: ``(m, n)``.
        ranks: Candidate ranks, rising, all below break-even; may be empty.
        losses: Loss of each rank, then of the dense matrix; falling, in any unit common to all curves.
        storage: How factors are stored, which says what a rank costs.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    losses: tuple[float, ...]
    storage: Storage = "plain"


def candidate_ranks(
    shape: tuple[int, int], step: int = RANK_STEP, *, storage: Storage = "plain"
) -> tuple[int, ...]:
    """Return the multiples of ``step`` below break-even, at most 48 of them."""
    most = break_even(shape, storage=storage)
    stride = step * max(1, -(-most // (step * MOST_RANKS)))
    return tuple(range(stride, most + 1, stride))


def uniform_curves(shapes: Shapes, *, step: int = RANK_STEP, storage: Storage = "plain") -> list[Curve]:
    """The same share of parameters everywhere: the optimum of ``Σ mn log(share)`` under a budget."""
    return [_log_curve(name, shape, weight=1.0, step=step, storage=storage) for name, shape in shapes.items()]


def fisher_curves(
    shapes: Shapes,
    moments: Mapping[str, Moments],
    *,
    score: Score = "gw2",
    step: int = RANK_STEP,
    storage: Storage = "plain",
) -> list[Curve]:
    """FLRA as read from the paper's abstract: rank in proportion to the Fisher score, clamped, the rest shared out.

    ``Σ (m + n) s log r`` under a budget of ``Σ r (m + n)`` is largest where ``r ∝ s``, also when some r are clamped.
    Pivoted, it is the parameters of a projection, not its rank, that are in proportion to ``(m + n) s``.
    """
    scores = fisher_scores(shapes, moments, score=score)
    mean = float(np.mean([*scores.values()]))
    if not mean > 0:  # nothing is known to matter more: equal ranks
        scores, mean = dict.fromkeys(scores, 1.0), 1.0
    return [
        _log_curve(name, (m, n), weight=scores[name] / mean * (m + n) / (m * n), step=step, storage=storage)
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


def spectrum_curves(
    factors: Mapping[str, Factors], *, step: int = RANK_STEP, storage: Storage = "plain"
) -> list[Curve]:
    """The predicted growth of the token loss, from the spectrum of each projection."""
    curves = []
    for name, f in factors.items():
        shape = (f.U.shape[0], f.V.shape[1])
        ranks = candidate_ranks(shape, step, storage=storage)
        curves.append(Curve(name, shape, ranks, (*(f.loss(r) for r in ranks), 0.0), storage))
    return curves


def measured_curves(
    factors: Mapping[str, Factors], *, step: int = RANK_STEP, storage: Storage = "plain"
) -> list[Curve]:
    """The growth of the token loss at every rank as measured.py found it.

    Raises:
        ValueError: It was not measured.
    """
    curves = []
    for name, f in factors.items():
        if f.measured is None:
            raise ValueError(f"{name}: its losses were not measured")
        shape = (f.U.shape[0], f.V.shape[1])
        ranks = candidate_ranks(shape, step, storage=storage)
        losses = f.measured.tolist()
        curves.append(Curve(name, shape, ranks, (*(losses[r] for r in ranks), 0.0), storage))
    return curves


def _log_curve(name: str, shape: tuple[int, int], *, weight: float, step: int, storage: Storage) -> Curve:
    m, n = shape
    ranks = candidate_ranks(shape, step, storage=storage)
    shares = [factor_parameters(shape, r, storage=storage) / (m * n) for r in ranks]
    losses = (*(-weight * m * n * float(np.log(s)) for s in shares), 0.0)
    return Curve(name, shape, ranks, losses, storage)


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
    _check_least(keep, ((c.shape, c.ranks, c.storage) for c in curves))
    weights = (1.0,) * len(keep) if stage_weights is None else tuple(stage_weights)
    total = sum(m * n for m, n in (c.shape for c in curves))
    budgets = np.floor(np.asarray(keep) * total + 1e-6)
    chosen = solve([_choices(c, len(keep), weights) for c in curves], budgets)
    projections = tuple(
        ProjectionPlan(c.name, c.shape, choice.ranks, storage=choice.storage)
        for c, choice in zip(curves, chosen, strict=True)
    )
    return RankPlan(allocator, tuple(float(k) for k in keep), projections, dict(scores or {}))


def check_feasible(
    shapes: Iterable[tuple[int, int]],
    keep: Sequence[float],
    *,
    step: int = RANK_STEP,
    storage: Storage = "plain",
) -> None:
    """Check, before anything is computed, that the smallest plan fits every stage.

    Raises:
        UsageError: A keep is below what the smallest ranks take.
    """
    _check_least(keep, ((s, candidate_ranks(s, step, storage=storage), storage) for s in shapes))


def _check_least(
    keep: Sequence[float], choices: Iterable[tuple[tuple[int, int], tuple[int, ...], Storage]]
) -> None:
    total = least = 0
    smallest: set[int] = set()
    for shape, ranks, storage in choices:
        dense = shape[0] * shape[1]
        total += dense
        least += min([dense, *(factor_parameters(shape, r, storage=storage) for r in ranks[:1])])
        smallest.update(ranks[:1])
    for k in keep:
        if least > floor(k * total + 1e-6):
            raise UsageError(
                f"keep {k:g} is below {least / total:.3f}, the least that ranks of {min(smallest, default=0)} allow",
                hint="ask for a larger keep or a smaller --rank-step",
            )


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


def _choices(curve: Curve, stages: int, weights: Sequence[float]) -> list[Choice]:
    """All forms of one projection, with the parameters each stage reads as their cost."""
    loss = loss_by_rank(curve)
    return [
        Choice(
            form,
            tuple(float(p.parameters(s)) for s in range(stages)),
            sum(w * loss[r] for w, r in zip(weights, form, strict=True)),
            storage="plain" if p.dense else curve.storage,
        )
        for form in nested_forms(curve.ranks, curve.shape, stages, storage=curve.storage)
        for p in (ProjectionPlan(curve.name, curve.shape, form, curve.storage),)
    ]


def loss_by_rank(curve: Curve) -> dict[int | None, float]:
    """Return the loss of every rank, of the full one and of the dense matrix (None)."""
    loss: dict[int | None, float] = dict(zip((*curve.ranks, None), curve.losses, strict=True))
    loss[min(curve.shape)] = loss[None]
    return loss


def nested_forms(
    ranks: Sequence[int], shape: tuple[int, int], stages: int, *, storage: Storage
) -> list[tuple[int | None, ...]]:
    """Return all nested rank sequences with at most one fall, and dense.

    Args:
        ranks: Candidates, rising.
        shape: ``(m, n)``.
        stages: How many stages.
        storage: How factors are stored.
    """
    forms: list[tuple[int | None, ...]] = [(None,) * stages, *((rank,) * stages for rank in ranks)]
    # Pivoted chunks a and b up to the full rank: 2ab parameters more than the matrix until the fall, fewer after it.
    highs = (*ranks, min(shape)) if storage == "pivoted" else ranks
    for high in highs:
        for fall in range(1, stages):
            forms.extend((high,) * fall + (low,) * (stages - fall) for low in ranks if low < high)
    return forms
