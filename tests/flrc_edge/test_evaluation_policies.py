"""Which stage computes which token under every policy, and what that activates."""

from __future__ import annotations

import pytest

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.policies import (
    default_policies,
    mean_share,
    nearest_stage,
    parse_policies,
    parse_policy,
)
from flrc_runtime.manifest import Schedule

SCHEDULE = Schedule((2, 5))
KEPT = (0.9, 0.7, 0.6)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("static:0", "0000000"),
        ("static:2", "2222222"),
        ("static:2:prompt0", "0222222"),
        ("schedule", "0011122"),
        ("reversed", "2211100"),
    ],
)
def test_scripts(spec: str, expected: str) -> None:
    script = parse_policy(spec, SCHEDULE).script(7, planned=7)
    assert "".join(map(str, script)) == expected


def test_reversed_keeps_the_mean_of_every_planned_length() -> None:
    forward, backward = (parse_policy(s, SCHEDULE) for s in ("schedule", "reversed"))
    for length in range(1, 12):
        scripts = [p.script(length, planned=length) for p in (forward, backward)]
        assert scripts[1] == scripts[0][::-1]
        assert mean_share(scripts[:1], KEPT) == pytest.approx(mean_share(scripts[1:], KEPT))


def test_reversed_stays_on_stage_0_behind_the_planned_length_and_is_cut_before_it() -> None:
    policy = parse_policy("reversed", SCHEDULE)
    assert policy.script(9, planned=7) == (2, 2, 1, 1, 1, 0, 0, 0, 0)
    assert policy.script(3, planned=7) == (2, 2, 1)
    assert parse_policy("schedule", SCHEDULE).script(9, planned=7) == (0, 0, 1, 1, 1, 2, 2, 2, 2)


def test_mean_share_by_hand() -> None:
    script = parse_policy("schedule", SCHEDULE).script(7, planned=7)
    assert mean_share([script], KEPT) == pytest.approx((2 * 0.9 + 3 * 0.7 + 2 * 0.6) / 7)
    assert mean_share([script, (0,) * 3], KEPT) == pytest.approx((5.1 + 2.7) / 10)


def test_default_policies_hold_the_fair_control() -> None:
    # 0.9, 0.9, 0.7 x 3, 0.6 x 15: a mean of 0.645, nearest to stage 2
    policies, control = default_policies(SCHEDULE, KEPT, planned=[20])
    assert control == "static:2:prompt0"
    assert [p.name for p in policies] == [
        "static:0",
        "static:1",
        "static:2",
        "static:2:prompt0",
        "schedule",
        "reversed",
    ]
    schedule = parse_policy("schedule", SCHEDULE)
    assert [nearest_stage(schedule, KEPT, planned=[n]) for n in (1, 2, 7, 20)] == [0, 0, 1, 2]


def test_the_control_of_a_schedule_that_never_moves_is_stage_0() -> None:
    policies, control = default_policies(Schedule((64,)), (0.9, 0.5), planned=[30, 40])
    assert control == "static:0" and control in [p.name for p in policies]


def test_one_stage_needs_no_control() -> None:
    policies, control = default_policies(Schedule(()), (0.8,), planned=[5])
    assert [p.name for p in policies] == ["static:0"] and control is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("static:3", "names stage 3: there are stages 0 to 2"),
        ("static:12:prompt0", "names stage 12: there are stages 0 to 2"),
        ("static:-1", "there is no policy 'static:-1'"),
        ("static", "there is no policy 'static'"),
        ("static:0:prompt1", "there is no policy"),
        ("Schedule", "there is no policy"),
        ("", "there is no policy ''"),
    ],
)
def test_impossible_policies(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_policy(spec, SCHEDULE)


def test_dense_is_a_policy_only_with_a_dense_model() -> None:
    parsed = parse_policies(["schedule", "dense", "schedule"], SCHEDULE, dense=True)
    assert [p.name for p in parsed] == ["schedule"]
    with pytest.raises(UsageError, match="needs the dense model"):
        parse_policies(["dense"], SCHEDULE, dense=False)
