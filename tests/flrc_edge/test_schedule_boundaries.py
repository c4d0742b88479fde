"""The choice of boundaries: exact against brute force, budgets, answer lengths, moves, and known answers."""

from __future__ import annotations

import time
from bisect import bisect_right
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flrc_edge import constrained_path
from flrc_edge.boundaries import choose, constant, default_budget, is_constant, used_stages
from flrc_edge.errors import UsageError

END = 1000


def figures(
    boundaries: Any, kl: Any, kept: Any, lengths: Any, block: int = 1, move_cost: float = 0.0
) -> tuple[float, float]:
    """Summed divergence and spend over the decode steps of the answers, counted one by one."""
    loss = spend = 0.0
    for length in lengths:
        before = 0
        for t in range(1, length):
            stage = bisect_right(boundaries, t)
            loss += kl[stage][t // block]
            spend += kept[stage] + move_cost * (stage != before)
            before = stage
    return loss, spend


def budget_of(mean: float, lengths: Any) -> float:
    return mean * sum(n - 1 for n in lengths)


def all_boundaries(stages: int, horizon: int, block: int = 1) -> Any:
    grid = sorted({1, *range(block, horizon, block)})
    return combinations_with_replacement([*grid, END], stages - 1)


@st.composite
def cases(draw: Any) -> Any:
    stages, horizon = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    block = draw(st.sampled_from([1, 2, 3]))
    columns = -(-horizon // block)
    values = draw(st.sampled_from([st.floats(0, 5), st.sampled_from([0.0, 0.5, 1.0])]))  # the latter tie
    kl = [[draw(values) for _ in range(columns)] for _ in range(stages)]
    shares = draw(st.sampled_from([st.floats(0.1, 1), st.sampled_from([0.5, 0.6, 0.7, 0.9])]))
    kept = sorted((draw(shares) for _ in range(stages)), reverse=True)
    lengths = draw(st.lists(st.integers(1, horizon), min_size=1, max_size=5))
    move_cost = draw(st.sampled_from([0.0, 0.0, 0.055, 0.7]))
    return kl, kept, lengths, horizon, block, move_cost


@settings(max_examples=150, deadline=None)
@given(cases(), st.floats(0.1, 1.2))
def test_choose_equals_brute_force(case: Any, mean: float) -> None:
    kl, kept, lengths, horizon, block, move_cost = case
    found = choose(
        kl, kept, lengths=lengths, horizon=horizon, block=block, mean_keep=mean, move_cost=move_cost, end=END
    )
    assert len(found.boundaries) == len(kept) - 1 and list(found.boundaries) == sorted(found.boundaries)
    assert found.stage_at(0) == 0  # the first token comes with the prompt
    assert set(found.boundaries) <= {1, END, *range(block, horizon, block)}
    loss, spend = figures(found.boundaries, kl, kept, lengths, block, move_cost)
    every = [
        figures(b, kl, kept, lengths, block, move_cost) for b in all_boundaries(len(kept), horizon, block)
    ]
    possible = [a for a, c in every if c <= budget_of(mean, lengths) + 1e-9]
    if possible:
        assert spend <= budget_of(mean, lengths) + 1e-7
        assert loss == pytest.approx(min(possible), abs=1e-6)
    else:
        assert spend == pytest.approx(min(c for _, c in every), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.1, 1), st.floats(0, 0.5))
def test_a_larger_budget_never_loses(case: Any, mean: float, more: float) -> None:
    kl, kept, lengths, horizon, block, _ = case
    _, cheapest = figures((1,) * (len(kept) - 1), kl, kept, lengths, block)
    mean = max(mean, kept[-1])  # below it there is nothing to choose
    assert cheapest <= budget_of(mean, lengths) + 1e-9
    losses = []
    for m in (mean, mean + more):
        found = choose(kl, kept, lengths=lengths, horizon=horizon, block=block, mean_keep=m, end=END)
        losses.append(figures(found.boundaries, kl, kept, lengths, block)[0])
    assert losses[1] <= losses[0] + 1e-6


@settings(max_examples=60, deadline=None)
@given(cases())
def test_no_constant_stage_within_the_default_budget_is_better(case: Any) -> None:
    kl, kept, lengths, horizon, block, _ = case
    found = choose(kl, kept, lengths=lengths, horizon=horizon, block=block, end=END)
    loss, _ = figures(found.boundaries, kl, kept, lengths, block)
    for stage, share in enumerate(kept):
        if share <= default_budget(kept):
            other = constant(stage, len(kept), end=END)
            assert loss <= figures(other.boundaries, kl, kept, lengths, block)[0] + 1e-6


def test_thinned_ways_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few ways a stage the search is no longer exact; budget and order still hold."""
    generator = np.random.default_rng(0)
    kept = np.sort(generator.uniform(0.5, 1, 6))[::-1].tolist()
    kl = [((1 - k) * generator.uniform(0.9, 1.1, 40)).tolist() for k in kept]
    lengths = generator.integers(5, 41, 12).tolist()
    losses = []
    for beams in ((2,), (16, 1024)):
        monkeypatch.setattr(constrained_path, "BEAMS", beams)
        found = choose(kl, kept, lengths=lengths, horizon=40, block=1)
        loss, spend = figures(found.boundaries, kl, kept, lengths)
        assert spend <= budget_of(default_budget(kept), lengths) + 1e-9
        losses.append(loss)
    assert losses[1] <= losses[0] <= 1.05 * losses[1]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_completions_are_the_least_of_all_ways(data: Any) -> None:
    segments, stages = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    draw = st.floats(0, 3)
    loss, spend = (
        np.array([[data.draw(draw) for _ in range(stages)] for _ in range(segments)]) for _ in range(2)
    )
    move = np.array([data.draw(draw) for _ in range(segments)])
    prices = np.array([0.0, 0.5, 2.0])
    found = constrained_path.completions(loss, spend, move, prices)
    for start, stage, (p, price) in product(range(segments), range(stages), enumerate(prices)):
        totals = []
        for way in combinations_with_replacement(range(stage, stages), segments - start):
            total, before = 0.0, stage
            for i, on in enumerate(way, start):
                total += loss[i, on] + price * (spend[i, on] + move[i] * (on != before))
                before = on
            totals.append(total)
        assert found[start, p, stage] == pytest.approx(min(totals), abs=1e-9)


def test_early_divergence_delays_the_move() -> None:
    """Half on .9 and half on .7 where small stages hurt early; all on .8 where the last one hurts late."""
    kept = [0.9, 0.8, 0.7]
    early, late = [3.0, 2.0, 1.0, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 1.0, 2.0, 3.0]
    assert choose([[0.0] * 6, early, early], kept, horizon=97, block=17).boundaries == (34, 34)
    assert choose([[0.0] * 6, late, [3 * v for v in late]], kept, horizon=96, block=16).boundaries == (1, 96)
    for kl in (early, late):
        found = choose([[0.0] * 6, kl], [0.9, 0.6], mean_keep=0.9, horizon=96, block=16)
        assert found.boundaries == (96,)  # nothing forces a move


def test_short_answers_count() -> None:
    """One long answer alone keeps 15 of its 31 steps on .9; nine short ones beside it leave no whole block for that."""
    kept, kl = [0.9, 0.5], [[0.0] * 4, [1.0, 0.8, 0.8, 0.8]]
    lengths = [32] + [8] * 9  # 94 steps, 70 of them in the first block
    assert choose(kl, kept, horizon=32, block=8, mean_keep=0.7).boundaries == (16,)
    assert choose(kl, kept, lengths=lengths, horizon=32, block=8, mean_keep=0.7).boundaries == (1,)
    assert choose(kl, kept, lengths=lengths, horizon=32, block=8, mean_keep=0.8).boundaries == (8,)


def test_positions_no_answer_reaches_cost_nothing() -> None:
    """Answers of at most 8 tokens: whatever the divergence after them, no budget is saved for it."""
    kl = [[0.0] * 8, [1.0] + [9.0] * 7]
    found = choose(kl, [0.9, 0.5], lengths=[8, 6, 4], horizon=32, block=4, mean_keep=0.9, end=500)
    assert found.boundaries == (500,)
    assert used_stages(found, longest=8) == (0,) and used_stages(found, longest=501) == (0, 1)


def test_no_decode_step_no_move() -> None:
    for lengths in ([], [1], [0, 1]):
        assert choose([[0.1], [0.2]], [0.9, 0.5], lengths=lengths, horizon=8, block=8, end=99).boundaries == (
            99,
        )
    result = choose([[0.5] * 12], [0.8])
    assert result.boundaries == () and result.stage_at(1000) == 0


def test_moves_that_do_not_pay_are_left_out() -> None:
    """Three moves without their price, one with it; and none if a single one cannot be paid for."""
    kept = [0.8, 0.7, 0.6, 0.5]
    kl = [[0.1] * 4, [0.2, 0.1, 0.2, 0.2], [0.3, 0.3, 0.1, 0.3], [0.4, 0.4, 0.4, 0.1]]
    options = {"horizon": 33, "block": 11, "mean_keep": 0.65}
    free = choose([row[:3] for row in kl], kept, **options)
    priced = choose([row[:3] for row in kl], kept, move_cost=1.0, **options)
    moves = [len({s.stage_at(t) for t in range(33)}) - 1 for s in (free, priced)]
    assert moves == [2, 1]
    flat = choose([[0.1] * 3] * 4, kept, move_cost=40.0, **options)
    assert flat.boundaries == (33, 33, 33)  # the cheapest: a move costs more than it ever saves


def test_a_latest_first_stage() -> None:
    kept, kl = [0.9, 0.8, 0.7], [[0.1] * 4, [0.15] * 4, [0.3] * 4]
    options = {"horizon": 33, "block": 8}
    assert choose(kl, kept, horizon=32, block=8).boundaries == (1, 32)
    falling = choose(kl, kept, horizon=32, block=8, first=0)
    assert falling.boundaries[0] > 1 and not is_constant(falling, longest=32)
    assert sum(kept[falling.stage_at(t)] for t in range(1, 32)) / 31 <= 0.8 + 1e-9
    tight = choose(kl, kept, horizon=32, block=8, first=0, mean_keep=0.7)
    assert tight.boundaries == (1, 1)  # the budget decides
    with pytest.raises(UsageError, match="3 rows of at least 5 divergences"):
        choose(kl, kept, **options)


def test_constant_schedules() -> None:
    assert [constant(s, 3, end=96).boundaries for s in range(3)] == [(96, 96), (1, 96), (1, 1)]
    for s in range(3):
        schedule = constant(s, 3, end=96)
        assert schedule.stage_at(0) == 0 and {schedule.stage_at(t) for t in range(1, 96)} == {s}
        assert is_constant(schedule, longest=96) and used_stages(schedule, longest=96) == tuple({0, s})
    assert not is_constant(constant(1, 3, end=96), longest=97)


def test_default_budget() -> None:
    assert default_budget([0.95, 0.9, 0.85]) == 0.9
    assert default_budget([0.896, 0.7986, 0.6979]) == 0.7986  # ranks come in steps: .7975 is the mean
    assert default_budget([0.9, 0.7]) == pytest.approx(0.8)
    assert default_budget([0.9, 0.8, 0.6]) == pytest.approx(2.3 / 3)


def test_bad_input() -> None:
    with pytest.raises(UsageError, match=r"must not grow: 0\.700, 0\.800"):
        choose([[0.1]] * 2, [0.7, 0.8], horizon=8)
    with pytest.raises(UsageError, match="2 stages need 2 rows"):
        choose([[0.1]], [0.8, 0.7], horizon=8)
    with pytest.raises(UsageError, match="end 7 lies inside the horizon of 8 tokens"):
        choose([[0.1]] * 2, [0.8, 0.7], horizon=8, end=7)


@pytest.mark.parametrize("seed", range(3))
def test_many_stages_and_long_answers_are_fast(seed: int) -> None:
    """16 stages over 1024 tokens: enumeration would see 10^18 schedules. CPU time, several times what it takes."""
    generator = np.random.default_rng(seed)
    kept = np.sort(generator.uniform(0.5, 1, 16))[::-1].tolist()
    kl = [((1 - k) ** 2 * generator.uniform(0.5, 1.5, 128)).tolist() for k in kept]
    lengths = generator.integers(5, 1025, 24).tolist()
    start = time.process_time()
    found = choose(kl, kept, lengths=lengths, horizon=1024, block=8)
    assert time.process_time() - start < 0.5
    _, spend = figures(found.boundaries, kl, kept, lengths, block=8)
    assert spend <= budget_of(default_budget(kept), lengths) * (1 + 1e-9)
