"""Rank allocation: budgets, nesting and optimality, on random shapes and on those of SmolLM2-135M."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flrc_edge.allocation import (
    MOST_RANKS,
    Curve,
    allocate,
    candidate_ranks,
    check_feasible,
    check_keep,
    fisher_curves,
    fisher_scores,
    spectrum_curves,
    uniform_curves,
)
from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Factors, break_even
from flrc_runtime.manifest import RankPlan

SMOLLM2 = {
    f"model.layers.{i}.{name}": shape
    for i in range(30)
    for name, shape in {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }.items()
}


def moments_with(g2: float, gw2: float) -> Moments:
    return Moments(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, g2, gw2)


def smollm2_curves(allocator: str) -> list[Curve]:
    """Synthetic convex curves with the spread of importance that real models have."""
    random = np.random.default_rng(5)
    if allocator == "uniform":
        return uniform_curves(SMOLLM2)
    if allocator == "fisher":
        scores = np.exp(random.normal(0, 1.2, len(SMOLLM2)))
        return fisher_curves(
            SMOLLM2, {n: moments_with(s, s) for n, s in zip(SMOLLM2, scores, strict=True)}, score="gw2"
        )
    factors = {}
    for name, (m, n) in SMOLLM2.items():
        rank = break_even((m, n))
        spectrum = np.exp(random.normal(-6, 1.5)) * np.arange(1, min(m, n) + 1) ** -random.uniform(0.6, 1.6)
        factors[name] = Factors(
            torch.empty(m, rank, device="meta"),
            torch.empty(rank, n, device="meta"),
            torch.from_numpy(spectrum),
            0.5,
        )
    return spectrum_curves(factors)


def loss_of(curves: list[Curve], plan: RankPlan) -> float:
    total = 0.0
    for curve, p in zip(curves, plan.projections, strict=True):
        values = dict(zip((*curve.ranks, None), curve.losses, strict=True))
        total += sum(values[r] for r in p.ranks)
    return total


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6])
@pytest.mark.parametrize("allocator", ["uniform", "fisher", "spectrum"])
def test_smollm2_meets_the_budget_within_a_thousandth(allocator: str, keep: float) -> None:
    plan = allocate(smollm2_curves(allocator), (keep,), allocator=allocator)
    assert keep * (1 - 1e-3) <= plan.kept(0) <= keep
    assert len(plan.projections) == 210 and plan.allocator == allocator and plan.keep == (keep,)


@pytest.mark.parametrize("keeps", [(0.9, 0.8, 0.7), (0.9, 0.75, 0.6), (0.8, 0.6)])
@pytest.mark.parametrize("allocator", ["uniform", "fisher", "spectrum"])
def test_smollm2_in_stages(allocator: str, keeps: tuple[float, ...]) -> None:
    plan = allocate(smollm2_curves(allocator), keeps, allocator=allocator)
    for stage, keep in enumerate(keeps):
        assert keep * (1 - 1e-3) <= plan.kept(stage) <= keep
    check_structure(plan, 32)


def test_stages_cost_little_loss() -> None:
    """A plan of three stages loses a little more than three plans of their own, which need not be nested."""
    curves = smollm2_curves("spectrum")
    keeps = (0.9, 0.8, 0.7)
    joint = loss_of(curves, allocate(curves, keeps, allocator="spectrum"))
    alone = sum(loss_of(curves, allocate(curves, (k,), allocator="spectrum")) for k in keeps)
    assert alone <= joint <= 1.25 * alone


def test_two_stages_are_near_brute_force() -> None:
    shape, ranks = (16, 16), (2, 4, 6)
    forms = [(None, None), *((a, b) for a in ranks for b in ranks if b <= a)]
    random = np.random.default_rng(1)
    for _ in range(30):
        curves = []
        for i in range(3):
            drops = np.sort(random.exponential(size=4))
            curves.append(
                Curve(f"p{i}", shape, ranks, tuple(float(x) for x in np.cumsum([0, *drops])[::-1][1:]))
            )
        keeps = (0.8, 0.5)
        plan = allocate(curves, keeps, allocator="spectrum")
        value = [dict(zip((*ranks, None), c.losses, strict=True)) for c in curves]
        best = min(
            sum(v[r] for v, form in zip(value, choice, strict=True) for r in form)
            for choice in product(forms, repeat=3)
            if all(
                sum(256 if f[s] is None else 32 * f[s] for f in choice) <= keep * 768
                for s, keep in enumerate(keeps)
            )
        )
        largest = max(a - b for c in curves for a, b in zip(c.losses, c.losses[1:], strict=False))
        assert best - 1e-9 <= loss_of(curves, plan) <= best + largest


def check_structure(plan: RankPlan, step: int) -> None:
    for p in plan.projections:
        if p.dense:
            assert p.ranks == (None,) * plan.num_stages
            continue
        ranks = [r for r in p.ranks if r is not None]
        assert len(ranks) == plan.num_stages
        assert all(r % step == 0 and 0 < r <= break_even(p.shape) for r in ranks)
        assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) <= 2  # falls at most once


shapes_of = st.lists(
    st.tuples(st.integers(4, 96), st.integers(4, 96)), min_size=1, max_size=8
)  # of a small model
keeps_of = st.lists(st.floats(0.15, 1.0), min_size=1, max_size=4, unique=True).map(
    lambda keeps: tuple(sorted(keeps, reverse=True))
)


@st.composite
def random_curves(draw: Any) -> tuple[list[Curve], int]:
    step = draw(st.sampled_from([1, 4, 8]))
    curves = []
    for i, shape in enumerate(draw(shapes_of)):
        ranks = candidate_ranks(shape, step)
        drops = draw(st.lists(st.floats(0, 1e6, width=32), min_size=len(ranks) + 1, max_size=len(ranks) + 1))
        if draw(st.booleans()):  # convex, as a spectrum is; else anything that falls
            drops = sorted(drops)
        losses = [float(x) for x in np.cumsum([0.0, *drops])[::-1][1:]]
        curves.append(Curve(f"p{i}", shape, ranks, tuple(losses)))
    return curves, step


def cheapest_improvements(curves: list[Curve], plan: RankPlan) -> list[tuple[float, ...]]:
    """Extra parameters of every stage, of each other form of one projection that lowers the loss."""
    result = []
    stages = plan.num_stages
    for curve, p in zip(curves, plan.projections, strict=True):
        m, n = curve.shape
        value = dict(zip((*curve.ranks, None), curve.losses, strict=True))
        forms: list[tuple[int | None, ...]] = [(None,) * stages]
        for high, low in product(curve.ranks, repeat=2):
            if low <= high:
                forms += [(high,) * s + (low,) * (stages - s) for s in range(1, stages + 1)]
        now = sum(value[r] for r in p.ranks)
        for form in forms:
            if sum(value[r] for r in form) < now * (1 - 1e-12):
                cost = [m * n if r is None else r * (m + n) for r in form]
                result.append(tuple(c - p.parameters(s) for s, c in enumerate(cost)))
    return result


@settings(max_examples=60, deadline=None)
@given(random_curves(), keeps_of)
def test_any_curves_any_keeps(case: tuple[list[Curve], int], keeps: tuple[float, ...]) -> None:
    curves, step = case
    total = sum(m * n for m, n in (c.shape for c in curves))
    least = sum(min([m * n, *(r * (m + n) for r in c.ranks[:1])]) for c in curves for m, n in [c.shape])
    if least > np.floor(keeps[-1] * total + 1e-6):
        with pytest.raises(UsageError, match=r"keep .* is below .*, the least"):
            allocate(curves, keeps, allocator="spectrum")
        with pytest.raises(UsageError, match=r"keep .* is below .*, the least"):
            check_feasible([c.shape for c in curves], keeps, step=step)
        return
    check_feasible([c.shape for c in curves], keeps, step=step)
    plan = allocate(curves, keeps, allocator="spectrum")
    budgets = [np.floor(k * total + 1e-6) for k in keeps]
    assert all(plan.activated(s) <= b for s, b in enumerate(budgets))
    check_structure(plan, step)
    # Nothing that would lower the loss still fits.
    slack = [b - plan.activated(s) for s, b in enumerate(budgets)]
    for extra in cheapest_improvements(curves, plan):
        assert any(e > room for e, room in zip(extra, slack, strict=True)), (extra, slack)
    assert allocate(curves, keeps, allocator="spectrum") == plan


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_stage_spectrum_is_within_a_step_of_brute_force(data: Any) -> None:
    count = data.draw(st.integers(1, 3))
    shape, step = (16, 16), 2
    ranks = candidate_ranks(shape, step)
    curves = []
    for i in range(count):
        drops = sorted(
            data.draw(
                st.lists(st.floats(1e-3, 10), min_size=len(ranks) + 1, max_size=len(ranks) + 1, unique=True)
            )
        )
        # The last drop, to dense, costs two ranks more than half a step; convex over parameters it stays.
        losses = np.cumsum([0.0, *drops])[::-1][1:]
        curves.append(Curve(f"p{i}", shape, ranks, tuple(float(x) for x in losses)))
    keep = data.draw(st.floats(0.3, 1.0))
    plan = allocate(curves, (keep,), allocator="spectrum")
    budget = np.floor(keep * 256 * count + 1e-6)
    best = np.inf
    for form in product((*ranks, None), repeat=count):
        cost = sum(256 if r is None else 32 * r for r in form)
        if cost <= budget:
            value = sum(
                dict(zip((*ranks, None), c.losses, strict=True))[r] for c, r in zip(curves, form, strict=True)
            )
            best = min(best, value)
    # Lagrangian: at most the gain of the one segment that no longer fitted is lost.
    largest = max(a - b for c in curves for a, b in zip(c.losses, c.losses[1:], strict=False))
    assert best - 1e-9 <= loss_of(curves, plan) <= best + largest + 1e-9


def test_one_stage_spectrum_equals_brute_force_where_steps_are_equal() -> None:
    """With segments of one size the greedy is exact; dense costs as much as one more step here."""
    shape, ranks = (16, 16), (2, 4, 6)  # 64, 128, 192 parameters, dense 256
    random = np.random.default_rng(0)
    for _ in range(60):
        curves = []
        for i in range(3):
            drops = np.sort(random.exponential(size=4))
            curves.append(
                Curve(f"p{i}", shape, ranks, tuple(float(x) for x in np.cumsum([0, *drops])[::-1][1:]))
            )
        keep = random.choice([0.25, 0.34, 0.5, 0.6, 0.75, 0.9, 1.0])
        plan = allocate(curves, (keep,), allocator="spectrum")
        budget = keep * 3 * 256
        best = min(
            sum(c.losses[i] for c, i in zip(curves, form, strict=True))
            for form in product(range(4), repeat=3)
            if sum(64 * (i + 1) for i in form) <= budget
        )
        assert loss_of(curves, plan) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_uniform_gives_equal_shares(keep: float) -> None:
    plan = allocate(uniform_curves(SMOLLM2), (keep,), allocator="uniform")
    steps = []
    for p in plan.projections:
        m, n = p.shape
        steps.append(abs(p.parameters(0) / (m * n) - keep) / (32 * (m + n) / (m * n)))
    # One projection may get what is left at the end.
    assert sorted(steps)[-2] <= 1 and max(steps) < 2


def test_fisher_ranks_are_proportional_to_scores() -> None:
    shapes = {f"p{i}": (m, n) for i, (m, n) in enumerate([(512, 512), (256, 1024), (1024, 256), (512, 768)])}
    scores = dict(zip(shapes, [1.0, 2.0, 1.5, 3.0], strict=True))
    moments = {n: moments_with(1.0, s) for n, s in scores.items()}
    curves = fisher_curves(shapes, moments, step=4)
    plan = allocate(curves, (0.35,), allocator="fisher", scores=scores)
    unit = [p.ranks[0] / scores[p.name] for p in plan.projections]  # type: ignore[operator]
    assert max(unit) - min(unit) <= 8 and min(unit) > 20
    assert plan.scores == scores


def test_a_clamped_fisher_rank_leaves_the_rest_proportional() -> None:
    shapes = {f"p{i}": (512, 512) for i in range(4)}
    scores = dict(zip(shapes, [1.0, 2.0, 3.0, 1e4], strict=True))
    moments = {n: moments_with(1.0, s) for n, s in scores.items()}
    plan = allocate(fisher_curves(shapes, moments, step=4), (0.5,), allocator="fisher")
    assert plan.projections[3].dense  # clamped at what is worth storing
    ranks = [p.ranks[0] for p in plan.projections[:3]]
    unit = [r / s for r, s in zip(ranks, [1.0, 2.0, 3.0], strict=True)]  # type: ignore[operator]
    assert max(unit) - min(unit) <= 8 and plan.kept(0) > 0.495


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 4, [1.0] * 4, [0.0, 0.0, 0.0, 1.0], [1e30, 1.0, 1.0, 1.0], [1e-30, 1.0, 1.0, 1.0]],
    ids=["all zero", "all equal", "one above zero", "one huge", "one tiny"],
)
@pytest.mark.parametrize("keeps", [(0.6,), (0.8, 0.6, 0.5)])
def test_odd_fisher_scores(scores: list[float], keeps: tuple[float, ...]) -> None:
    shapes = {f"p{i}": (256, 256) for i in range(4)}
    moments = {n: moments_with(s, s) for n, s in zip(shapes, scores, strict=True)}
    plan = allocate(fisher_curves(shapes, moments, step=8), keeps, allocator="fisher")
    check_structure(plan, 8)
    for stage, keep in enumerate(keeps):
        assert plan.kept(stage) <= keep
    if len(set(scores)) == 1:  # nothing matters more: the budget is spent, evenly
        assert plan.kept(0) > keeps[0] - 0.05
        shares = [p.parameters(0) for p in plan.projections]
        assert max(shares) <= 2 * min(shares)
    if scores[0] == 1e30:
        assert plan.projections[0].dense and plan.kept(0) > keeps[0] - 0.07


def test_score_variants() -> None:
    shapes = {"a": (4, 6)}
    moments = {"a": moments_with(g2=48.0, gw2=96.0)}
    expected = {"gw2": 96.0, "gw2-rms": 2.0, "g2-sum": 48.0, "g2-mean": 2.0, "g2-rms": 2**0.5}
    for score, value in expected.items():
        assert fisher_scores(shapes, moments, score=score)["a"] == pytest.approx(value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="score 'best' is not one of gw2"):
        fisher_scores(shapes, moments, score="best")  # type: ignore[arg-type]


def test_stage_weights_move_the_loss_where_tokens_are() -> None:
    curves = smollm2_curves("spectrum")[:42]
    losses = []
    for weights in ((0.9, 0.1), (0.1, 0.9)):
        plan = allocate(curves, (0.8, 0.6), allocator="spectrum", stage_weights=weights)
        value = [dict(zip((*c.ranks, None), c.losses, strict=True)) for c in curves]
        losses.append(
            [sum(v[p.ranks[s]] for v, p in zip(value, plan.projections, strict=True)) for s in (0, 1)]
        )
    assert losses[0][0] <= losses[1][0] and losses[1][1] <= losses[0][1]


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (8192, 28672), (7, 7)])
def test_candidate_ranks(shape: tuple[int, int]) -> None:
    ranks = candidate_ranks(shape)
    assert len(ranks) <= MOST_RANKS and all(r % 32 == 0 for r in ranks)
    assert all(r <= break_even(shape) for r in ranks)
    if break_even(shape) >= 32:
        assert ranks[0] >= 32 and ranks[-1] > break_even(shape) - ranks[0]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ((), "at least one keep"),
        ((0.0,), r"keep must lie in \(0, 1\], not 0"),
        ((-0.5,), r"keep must lie in \(0, 1\], not -0.5"),
        ((1.1,), r"keep must lie in \(0, 1\], not 1.1"),
        ((float("nan"),), r"keep must lie in \(0, 1\], not nan"),
        ((float("inf"),), r"keep must lie in \(0, 1\], not inf"),
        ((0.8, 0.9), "below the one before: 0.8, 0.9"),
        ((0.8, 0.8), "below the one before: 0.8, 0.8"),
    ],
)
def test_keep_errors(keep: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_keep(keep)
    with pytest.raises(UsageError, match=message):
        allocate(uniform_curves(SMOLLM2), keep, allocator="uniform")


def test_a_keep_no_rank_allows_says_which_would_do() -> None:
    with pytest.raises(UsageError, match=r"keep 0.01 is below 0\.\d+, the least that ranks of 32 allow"):
        allocate(uniform_curves(SMOLLM2), (0.5, 0.01), allocator="uniform")
