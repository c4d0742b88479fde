"""Policies on plain numbers: no clock, no device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flrc_runtime import UsageError, generate
from flrc_runtime.adaptive_policy import Cheapest, LatencyBudget, MeanBudget, SignalStages
from flrc_runtime.engine import Model
from flrc_runtime.policy import FixedStage, StepState


def decode(policy: Callable[[StepState], int], ms: Callable[[int, int], float], tokens: int) -> list[int]:
    """Stages of an answer whose step i takes ``ms(stage, i)``; the first token comes with the prompt."""
    stages, last = [0], 0.0
    for i in range(1, tokens):
        stages.append(policy(StepState(i, 10 + i, last, stages[-1])))
        last = ms(stages[-1], i)
    return stages


@pytest.mark.parametrize(("budget", "settled"), [(12.0, 0), (8.0, 1), (5.5, 2), (1.0, 2)])
def test_the_earliest_stage_within_the_time(budget: float, settled: int) -> None:
    stages = decode(LatencyBudget(budget, 3), lambda stage, _: (10.0, 7.0, 5.0)[stage], 200)
    assert stages[-100:] == [settled] * 100


def test_a_slow_spell_is_left_again() -> None:
    def ms(stage: int, i: int) -> float:
        return (10.0, 7.0, 5.0)[stage] * (1.6 if 60 <= i < 120 else 1.0)

    stages = decode(LatencyBudget(12.0, 3), ms, 240)
    assert set(stages[:60]) == {0} and set(stages[90:120]) == {1} and set(stages[200:]) == {0}


def test_one_slow_step_moves_nothing() -> None:
    stages = decode(LatencyBudget(12.0, 3), lambda stage, i: 14.0 if i == 30 else 10.0, 60)
    assert stages == [0] * 60


@given(
    kept=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=4),
    share=st.floats(0.0, 1.0),
    block=st.integers(1, 40),
    tokens=st.integers(2, 300),
)
def test_the_mean_is_kept_at_every_block(kept: list[float], share: float, block: int, tokens: int) -> None:
    kept = sorted(kept, reverse=True)
    mean = kept[-1] + share * (kept[0] - kept[-1])
    stages = decode(MeanBudget(mean, kept, block=block), lambda *_: 1.0, tokens)
    spent = 0.0
    for i, stage in enumerate(stages, 1):
        spent += kept[stage]
        if i % block == 0 and i > 1:
            first = kept[0] - kept[-1]  # the prompt's stage may have been too dear for the first block
            assert spent <= mean * i + first + 1e-6
    assert spent <= mean * tokens + block * (kept[0] - kept[-1]) + 1e-6


def test_a_mean_is_spent() -> None:
    stages = decode(MeanBudget(0.8, (0.9, 0.8, 0.6)), lambda *_: 1.0, 320)
    assert sum((0.9, 0.8, 0.6)[s] for s in stages) / 320 == pytest.approx(0.8, abs=0.005)
    assert decode(MeanBudget(1.0, (0.9, 0.8)), lambda *_: 1.0, 50) == [0] * 50


def test_a_signal_with_hysteresis() -> None:
    values = iter([0.9, 0.55, 0.49, 0.52, 0.56, 0.1, float("nan"), 0.22, 0.3, 0.9])
    policy = SignalStages(lambda: next(values), (0.5, 0.2), hysteresis=0.05)
    assert decode(policy, lambda *_: 1.0, 11)[1:] == [0, 0, 1, 1, 0, 2, 2, 2, 1, 0]


def test_the_cheapest_of_several(model: Model) -> None:
    policy = Cheapest(MeanBudget(1.0, (1.0, 0.8)), FixedStage(1, prompt_stage=0))
    answer = generate(model, "Once upon a time", max_tokens=6, policy=policy)
    assert answer.stage_of_token == (0, 1, 1, 1, 1, 1)
    assert Cheapest(FixedStage(1), FixedStage(0)).prompt_stage == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatencyBudget(0.0, 2), "not positive"),
        (lambda: LatencyBudget(float("nan"), 2), "not positive"),
        (lambda: MeanBudget(0.5, (0.9, 0.8)), "below 0.8"),
        (lambda: MeanBudget(0.5, ()), "must be given"),
        (lambda: MeanBudget(0.9, (0.8, 0.9)), "must not grow"),
        (lambda: MeanBudget(0.9, (0.9,), block=0), "too short"),
        (lambda: SignalStages(lambda: 1.0, (0.2, 0.5)), "must fall"),
        (lambda: SignalStages(lambda: 1.0, (0.5,), hysteresis=-1), "negative"),
        (lambda: Cheapest(), "at least one policy"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
