"""The solver: budgets, nesting and optimality, on random shapes and on those of SmolLM2-135M."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flrc_edge.allocation import (
    Curve,
    allocate,
    candidate_ranks,
    check_feasible,
    fisher_curves,
    spectrum_curves,
    uniform_curves,
)
from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Factors
from flrc_runtime.manifest import RankPlan, break_even

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


def smollm2_curves(allocator: str, storage: Any = "plain") -> list[Curve]:
    """Synthetic convex curves with the spread of importance that real models have."""
    random = np.random.default_rng(5)
    if allocator == "uniform":
        return uniform_curves(SMOLLM2, storage=storage)
    if allocator == "fisher":
        scores = np.exp(random.normal(0, 1.2, len(SMOLLM2)))
        moments = {n: moments_with(s, s) for n, s in zip(SMOLLM2, scores, strict=True)}
        return fisher_curves(SMOLLM2, moments, score="gw2", storage=storage)
    factors = {}
    for name, (m, n) in SMOLLM2.items():
        rank = break_even((m, n), storage=storage)
        spectrum = np.exp(random.normal(-6, 1.5)) * np.arange(1, min(m, n) + 1) ** -random.uniform(0.6, 1.6)
        factors[name] = Factors(
            torch.empty(m, rank, device="meta"),
            torch.empty(rank, n, device="meta"),
            torch.from_numpy(spectrum),
            0.5,
        )
    return spectrum_curves(factors, storage=storage)


def values_of(curve: Curve) -> dict[int | None, float]:
    """Loss of every rank; all of them lose what the matrix itself does."""
    return {min(curve.shape): curve.losses[-1], **dict(zip((*curve.ranks, None), curve.losses, strict=True))}


def loss_of(curves: list[Curve], plan: RankPlan) -> float:
    return sum(
        values_of(curve)[rank] for curve, p in zip(curves, plan.projections, strict=True) for rank in p.ranks
    )


def forms_of(curve: Curve, stages: int) -> list[tuple[int | None, ...]]:
    """Dense, or ranks that fall at most once; pivoted, the first ones may be all there are."""
    forms: list[tuple[int | None, ...]] = [(None,) * stages]
    highs = {*curve.ranks, *([min(curve.shape)] if curve.storage == "pivoted" else [])}
    for high, low in product(sorted(highs), curve.ranks):
        if low <= high:
            forms += [(high,) * s + (low,) * (stages - s) for s in range(0 if low == high else 1, stages)]
    return sorted(set(forms), key=str)


def cost_of(curve: Curve, form: tuple[int | None, ...]) -> list[int]:
    """Parameters of every stage: of a first chunk of the last rank, and of a second up to the first."""
    (m, n), squared = curve.shape, curve.storage == "pivoted"
    high, low = form[0], form[-1]
    if high is None or low is None:
        return [m * n] * len(form)
    first, more = (r * (m + n) - squared * r * r for r in (low, high - low))
    return [first + (more if rank == high and high > low else 0) for rank in form]


def brute_force(curves: list[Curve], keeps: tuple[float, ...]) -> float:
    """The least loss of all plans within the budgets."""
    budgets = [np.floor(keep * sum(m * n for m, n in (c.shape for c in curves)) + 1e-6) for keep in keeps]
    loss, cost = np.zeros(1), np.zeros((1, len(keeps)))
    for curve in curves:
        forms = forms_of(curve, len(keeps))
        own = np.array([sum(values_of(curve)[r] for r in form) for form in forms])
        loss = (loss[:, None] + own).ravel()
        cost = (cost[:, None] + np.array([cost_of(curve, form) for form in forms])).reshape(-1, len(keeps))
    return float(loss[(cost <= budgets).all(axis=1)].min())


def random_curve(name: str, shape: tuple[int, int], step: int, storage: Any, random: Any) -> Curve:
    """A curve as convex as a spectrum's."""
    ranks = candidate_ranks(shape, step, storage=storage)
    drops = np.sort(random.exponential(size=len(ranks) + 1))
    return Curve(name, shape, ranks, tuple(float(x) for x in np.cumsum([0, *drops])[::-1][1:]), storage)


both_storages = pytest.mark.parametrize("storage", ["plain", "pivoted"])


@both_storages
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6])
@pytest.mark.parametrize("allocator", ["uniform", "fisher", "spectrum"])
def test_smollm2_meets_the_budget_within_a_thousandth(allocator: str, keep: float, storage: str) -> None:
    plan = allocate(smollm2_curves(allocator, storage), (keep,), allocator=allocator)
    assert keep * (1 - 1e-3) <= plan.kept(0) <= keep
    assert len(plan.projections) == 210 and plan.allocator == allocator and plan.keep == (keep,)


@both_storages
@pytest.mark.parametrize("keeps", [(0.9, 0.8, 0.7), (0.9, 0.75, 0.6), (0.8, 0.6)])
@pytest.mark.parametrize("allocator", ["uniform", "fisher", "spectrum"])
def test_smollm2_in_stages(allocator: str, keeps: tuple[float, ...], storage: str) -> None:
    plan = allocate(smollm2_curves(allocator, storage), keeps, allocator=allocator)
    for stage, keep in enumerate(keeps):
        assert keep * (1 - 1e-3) <= plan.kept(stage) <= keep
    check_structure(plan, 32)


@pytest.mark.parametrize("keeps", [(0.9,), (0.6,), (0.3,), (0.8, 0.6), (0.9, 0.8, 0.7), (0.7, 0.5, 0.3)])
def test_pivoted_loses_less_at_the_same_keep(keeps: tuple[float, ...]) -> None:
    """Every plain plan costs fewer parameters pivoted; what is saved buys 4 to 16 % of the loss."""
    losses = []
    for storage in ("plain", "pivoted"):
        curves = smollm2_curves("spectrum", storage)
        losses.append(loss_of(curves, allocate(curves, keeps, allocator="spectrum")))
    assert losses[1] < 0.98 * losses[0]


def test_dense_first_and_fewer_ranks_later() -> None:
    """Where a later stage is worth it, all ranks come in two chunks a and b, which hold 2ab more than the matrix."""
    plan = allocate(smollm2_curves("spectrum", "pivoted"), (0.8, 0.6), allocator="spectrum")
    found = [p for p in plan.projections if p.ranks[0] == min(p.shape)]
    assert len(found) > 5
    for p in found:
        (m, n), (full, later) = p.shape, p.ranks
        assert full is not None and later is not None
        assert p.parameters(0) == m * n + 2 * later * (full - later) and p.parameters(1) < m * n


@both_storages
def test_stages_cost_little_loss(storage: str) -> None:
    """A plan of three stages loses a little more than three plans of their own, which need not be nested."""
    curves = smollm2_curves("spectrum", storage)
    keeps = (0.9, 0.8, 0.7)
    joint = loss_of(curves, allocate(curves, keeps, allocator="spectrum"))
    alone = sum(loss_of(curves, allocate(curves, (k,), allocator="spectrum")) for k in keeps)
    assert alone <= joint <= 1.25 * alone


@both_storages
@pytest.mark.parametrize("keeps", [(0.3,), (0.5,), (0.7,), (0.9,), (0.8, 0.5), (0.9, 0.7), (0.6, 0.3)])
def test_near_brute_force(keeps: tuple[float, ...], storage: str) -> None:
    """Never further from the optimum than one exchange is worth, and nearly always it."""
    random = np.random.default_rng(1)
    exact = 0
    for _ in range(30):
        shapes = [(16, 16), (8, 24), (24, 8)]
        curves = [random_curve(f"p{i}", shape, 2, storage, random) for i, shape in enumerate(shapes)]
        loss = loss_of(curves, allocate(curves, keeps, allocator="spectrum"))
        best = brute_force(curves, keeps)
        largest = max(a - b for c in curves for a, b in pairwise(c.losses))
        assert best - 1e-9 <= loss <= best + 0.7 * largest
        exact += loss <= best + 1e-9
    assert exact >= (25 if storage == "plain" else 15)


@both_storages
@pytest.mark.parametrize("exponent", [0, 1, 2, 3])
def test_a_budget_that_a_price_meets_is_spent_in_the_best_way(exponent: int, storage: str) -> None:
    """What is best at some price of a parameter is the best plan of its own size, whatever the curves."""
    random = np.random.default_rng(exponent)
    for _ in range(25):
        curves = [
            random_curve(f"p{i}", (16, 24) if i % 2 else (24, 16), 2, storage, random) for i in range(3)
        ]
        price = 10.0 ** -(exponent + random.uniform())
        best = [
            min(forms_of(c, 1), key=lambda form, c=c: values_of(c)[form[0]] + price * cost_of(c, form)[0])
            for c in curves
        ]
        size = sum(cost_of(c, form)[0] for c, form in zip(curves, best, strict=True))
        keep = size / sum(16 * 24 for _ in curves)
        plan = allocate(curves, (keep,), allocator="spectrum")
        wanted = sum(values_of(c)[form[0]] for c, form in zip(curves, best, strict=True))
        assert plan.activated(0) <= size and loss_of(curves, plan) == pytest.approx(wanted, abs=1e-9)
        assert brute_force(curves, (keep,)) == pytest.approx(wanted, abs=1e-9)


def check_structure(plan: RankPlan, step: int) -> None:
    for p in plan.projections:
        if p.dense:
            assert p.ranks == (None,) * plan.num_stages
            continue
        ranks = [r for r in p.ranks if r is not None]
        assert len(ranks) == plan.num_stages
        assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) <= 2  # falls at most once
        if p.storage == "pivoted" and ranks[0] == min(p.shape):  # dense first, fewer ranks later
            assert ranks[-1] < ranks[0]
            ranks.remove(ranks[0])
        most = break_even(p.shape, storage=p.storage)
        assert all((r % step == 0 and 0 < r <= most) or r == min(p.shape) for r in ranks)


shapes_of = st.lists(
    st.tuples(st.integers(4, 96), st.integers(4, 96)), min_size=1, max_size=8
)  # of a small model
keeps_of = st.lists(st.floats(0.15, 1.0), min_size=1, max_size=4, unique=True).map(
    lambda keeps: tuple(sorted(keeps, reverse=True))
)


@st.composite
def random_curves(draw: Any) -> tuple[list[Curve], int]:
    step = draw(st.sampled_from([1, 4, 8]))
    storage = draw(st.sampled_from(["plain", "pivoted"]))
    curves = []
    for i, shape in enumerate(draw(shapes_of)):
        ranks = candidate_ranks(shape, step, storage=storage)
        drops = draw(st.lists(st.floats(0, 1e6, width=32), min_size=len(ranks) + 1, max_size=len(ranks) + 1))
        if draw(st.booleans()):  # convex, as a spectrum is; else anything that falls
            drops = sorted(drops)
        losses = [float(x) for x in np.cumsum([0.0, *drops])[::-1][1:]]
        curves.append(Curve(f"p{i}", shape, ranks, tuple(losses), storage))
    return curves, step


def cheapest_improvements(curves: list[Curve], plan: RankPlan) -> list[tuple[float, ...]]:
    """Extra parameters of every stage, of each other form of one projection that lowers the loss."""
    result = []
    for curve, p in zip(curves, plan.projections, strict=True):
        value = values_of(curve)
        now = sum(value[r] for r in p.ranks)
        for form in forms_of(curve, plan.num_stages):
            if sum(value[r] for r in form) < now * (1 - 1e-12):
                cost = cost_of(curve, form)
                result.append(tuple(c - p.parameters(s) for s, c in enumerate(cost)))
    return result


@settings(max_examples=60, deadline=None)
@given(random_curves(), keeps_of)
def test_any_curves_any_keeps(case: tuple[list[Curve], int], keeps: tuple[float, ...]) -> None:
    curves, step = case
    total = sum(m * n for m, n in (c.shape for c in curves))
    storage = curves[0].storage
    least = sum(min(cost_of(c, form)[0] for form in ((None,), *((r,) for r in c.ranks[:1]))) for c in curves)
    if least > np.floor(keeps[-1] * total + 1e-6):
        with pytest.raises(UsageError, match=r"keep .* is below .*, the least"):
            allocate(curves, keeps, allocator="spectrum")
        with pytest.raises(UsageError, match=r"keep .* is below .*, the least"):
            check_feasible([c.shape for c in curves], keeps, step=step, storage=storage)
        return
    check_feasible([c.shape for c in curves], keeps, step=step, storage=storage)
    plan = allocate(curves, keeps, allocator="spectrum")
    budgets = [np.floor(k * total + 1e-6) for k in keeps]
    assert all(plan.activated(s) <= b for s, b in enumerate(budgets))
    check_structure(plan, step)
    assert all(p.storage == ("plain" if p.dense else storage) for p in plan.projections)
    for curve, p in zip(curves, plan.projections, strict=True):
        assert p.ranks in forms_of(curve, plan.num_stages)
        assert [p.parameters(s) for s in range(plan.num_stages)] == cost_of(curve, p.ranks)
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


@both_storages
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_uniform_gives_equal_shares(keep: float, storage: Any) -> None:
    plan = allocate(uniform_curves(SMOLLM2, storage=storage), (keep,), allocator="uniform")
    steps = []
    for p in plan.projections:
        m, n = p.shape
        steps.append(abs(p.parameters(0) / (m * n) - keep) / (32 * (m + n) / (m * n)))
    # One projection may get what is left at the end.
    assert sorted(steps)[-2] <= 1 and max(steps) < 2


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


def test_stage_weights_move_the_loss_where_tokens_are() -> None:
    curves = smollm2_curves("spectrum")[:42]
    losses = []
    for weights in ((0.9, 0.1), (0.1, 0.9)):
        plan = allocate(curves, (0.8, 0.6), allocator="spectrum", stage_weights=weights)
        value = [values_of(c) for c in curves]
        losses.append(
            [sum(v[p.ranks[s]] for v, p in zip(value, plan.projections, strict=True)) for s in (0, 1)]
        )
    assert losses[0][0] <= losses[1][0] and losses[1][1] <= losses[0][1]
