"""Ranks and number formats chosen together: within the bytes, nested, and the best there is on small problems."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from flrc_edge.allocation import Curve
from flrc_edge.bit_allocation import joint_plan
from flrc_edge.errors import UsageError
from flrc_edge.rounding_losses import RoundingLosses
from flrc_exporters.number_format import NumberFormat
from flrc_exporters.weight_table import file_size

DENSE = {"int8/32": 1e-4, "int4/32": 0.01, "int2/32": 0.3}
PAIRS = {("int8/32", "int8/32"): 3e-4, ("int4/32", "int4/32"): 0.03}


@pytest.fixture
def problem(compressed_stories: Any) -> Any:
    """The shapes of stories260k, with projections that matter ten times more than others."""
    config = compressed_stories.source.config
    curves, rounding = [], {}
    for i, p in enumerate(config.projections()):
        weight = 10.0 if i % 3 == 0 else 1.0
        ranks = tuple(range(8, min(p.shape) // 2, 8))
        losses = tuple(weight * 0.5 * 0.9**r for r in ranks)
        curves.append(Curve(p.name, p.shape, ranks, (*losses, 0.0)))
        rounding[p.name] = RoundingLosses(
            {f: weight * loss for f, loss in DENSE.items()},
            {"plain": {f: weight * loss for f, loss in PAIRS.items()}},
        )
    return config, curves, rounding


def plan_of(problem: Any, *sizes: int) -> Any:
    config, curves, rounding = problem
    return joint_plan(
        config, [curves], rounding, {"int8/32": 1e-3, "int4/32": 0.05}, sizes, allocator="measured"
    )


def loss_of(problem: Any, plan: Any) -> float:
    _, curves, rounding = problem
    total = {"int8/32": 1e-3, "int4/32": 0.05}[plan.embedding]
    for curve, p in zip(curves, plan.projections, strict=True):
        if p.dense:
            total += rounding[p.name].dense[p.formats[0]]
        else:
            total += (
                curve.losses[curve.ranks.index(p.ranks[0])]
                + rounding[p.name].factored["plain"][p.formats[:2]]
            )
    return total


def test_less_bytes_lose_more_and_sizes_are_met(problem: Any) -> None:
    losses = []
    for size in (310_000, 250_000, 200_000, 160_000):
        plan = plan_of(problem, size)
        written = file_size(problem[0], plan, context=problem[0].export_context())
        assert 0.96 * size < written <= size
        losses.append(loss_of(problem, plan))
    assert losses == sorted(losses) and losses[0] < 0.2 * losses[-1]


def test_what_matters_more_gets_more_bits(problem: Any) -> None:
    plan = plan_of(problem, 200_000)
    bits: dict[bool, list[float]] = {True: [], False: []}
    for i, p in enumerate(plan.projections):
        size = sum(NumberFormat.named(p.format_of(m)).size(*shape) for m, shape in p.matrices().items())
        bits[i % 3 == 0].append(8 * size / (p.shape[0] * p.shape[1]))
    assert sum(bits[True]) / len(bits[True]) > 1.2 * sum(bits[False]) / len(bits[False])


def test_near_the_best_of_all_plans(problem: Any) -> None:
    """Three projections, everything else as it is in the plan: no other choice of theirs is better and as small."""
    config, curves, rounding = problem
    size = 220_000
    plan = plan_of(problem, size)
    free = [0, 3, 7]

    def forms(i: int) -> list[tuple[float, float]]:
        m, n = curves[i].shape
        found = [
            (NumberFormat.named(f).size(m, n), loss) for f, loss in rounding[curves[i].name].dense.items()
        ]
        for rank, lost in zip(curves[i].ranks, curves[i].losses, strict=False):
            for (v, u), rounded in rounding[curves[i].name].factored["plain"].items():
                cost = NumberFormat.named(v).size(rank, n) + NumberFormat.named(u).size(m, rank)
                found.append((cost, lost + rounded))
        return found

    def spent(i: int) -> tuple[float, float]:
        p = plan.projections[i]
        cost = sum(NumberFormat.named(p.format_of(m)).size(*shape) for m, shape in p.matrices().items())
        return next(
            (c, lost) for c, lost in forms(i) if c == cost and abs(lost - _own(problem, plan, i)) < 1e-12
        )

    budget = sum(spent(i)[0] for i in free) + size - file_size(config, plan, context=config.export_context())
    ours = sum(spent(i)[1] for i in free)
    best = min(
        sum(c[1] for c in choice)
        for choice in product(*(forms(i) for i in free))
        if sum(c[0] for c in choice) <= budget
    )
    assert ours <= best + 0.02 * loss_of(problem, plan)


def _own(problem: Any, plan: Any, i: int) -> float:
    _, curves, rounding = problem
    p, curve = plan.projections[i], curves[i]
    if p.dense:
        return float(rounding[p.name].dense[p.formats[0]])
    return float(
        curve.losses[curve.ranks.index(p.ranks[0])] + rounding[p.name].factored["plain"][p.formats[:2]]
    )


def test_no_row_is_padded(problem: Any) -> None:
    """Inputs of 64 and 172: blocks of 128 would hold twice as many as there are, or half as many again."""
    config, curves, _ = problem
    only = RoundingLosses({"int4/128": 0.0}, {"plain": {("int4/128", "int4/128"): 0.0}})
    plan = plan_of((config, curves, dict.fromkeys(problem[2], only)), 180_000)
    for p in plan.projections:
        for matrix, (_, width) in p.matrices().items():
            block = NumberFormat.named(p.format_of(matrix)).block_size
            assert block == (64 if width % 64 == 0 else 32)


def test_stages_are_nested_and_read_less(problem: Any) -> None:
    config, curves, _ = problem
    only = RoundingLosses({"int8/32": 0.0}, {"plain": {("int8/32", "int8/32"): 0.0}})
    plan = plan_of((config, curves, dict.fromkeys(problem[2], only)), 290_000, 230_000)
    assert plan.num_stages == 2 and plan.keep[0] > plan.keep[1]
    assert file_size(config, plan, context=config.export_context()) <= 290_000
    falling = [p for p in plan.projections if not p.dense and p.ranks[0] > p.ranks[1]]
    assert falling and all(len(p.formats) == 4 for p in falling)


@pytest.mark.parametrize(("sizes", "message"), [((200_000, 200_000), "must fall"), ((50_000,), "the least")])
def test_sizes_that_cannot_be(problem: Any, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(problem, *sizes)
