"""Bootstrap intervals against distributions whose intervals are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.bootstrap import Bootstrap, mean, pooled_mean, pooled_quantile, ratio


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = Bootstrap(400, resamples=4000).estimate(mean(values))
    half = 1.96 * values.std() / 400**0.5
    assert found.low is not None and found.high is not None
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = Bootstrap(60, resamples=300).estimate(mean(generator.uniform(0, 1, 60)))
        assert found.low is not None and found.high is not None
        held += found.low <= 0.5 <= found.high
    assert 0.89 <= held / 200 <= 0.985


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    bootstrap = Bootstrap(2, resamples=200)
    assert bootstrap.estimate(ratio([1, 9], [1, 3])).value == 2.5
    found = bootstrap.estimate(ratio([1, 9], [1, 3], transform=math.exp))
    # Either unit may be drawn twice.
    assert (found.low, found.value, found.high) == (math.exp(1), math.exp(2.5), math.exp(3))


def test_pooled_values_weigh_units_by_their_length() -> None:
    units = [np.array([1.0, 2.0, 3.0]), np.array([10.0])]
    assert Bootstrap(2).estimate(pooled_mean(units)).value == 4


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [7, 100, 1234])
def test_pooled_quantile_is_the_nearest_rank(q: float, size: int) -> None:
    values = np.random.default_rng(size).exponential(size=size)
    units = np.array_split(values, 5)
    statistic = pooled_quantile(units, q)
    assert statistic(np.ones(5)) == np.sort(values)[math.ceil(round(q * size, 9)) - 1]
    # Drawing a unit twice is the same as having its values twice.
    drawn = np.concatenate([units[0], units[0], units[3], units[3], units[4]])
    expected = np.sort(drawn)[math.ceil(round(q * len(drawn), 9)) - 1]
    assert statistic(np.array([2.0, 0, 0, 2, 1])) == expected


def test_a_quantile_is_found_where_one_unit_holds_all_large_values() -> None:
    units = [np.full(1000, 5.0), *(np.zeros(1000) for _ in range(49))]
    weights = np.zeros(50)
    weights[1:] = 50 / 49
    assert pooled_quantile(units, 0.99)(weights) == 0
    assert pooled_quantile(units, 0.99)(np.ones(50)) == 5


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(0, 10, 50)
    bootstrap = Bootstrap(50)
    constant = bootstrap.difference(mean(a + 1), mean(a))
    assert (constant.value, constant.low, constant.high) == pytest.approx((1, 1, 1))
    noisy = bootstrap.difference(mean(a + generator.normal(1, 0.1, 50)), mean(a))
    alone = bootstrap.estimate(mean(a))
    assert None not in (noisy.low, noisy.high, alone.low, alone.high)
    assert noisy.high - noisy.low < 0.1 < alone.high - alone.low  # type: ignore[operator]


def test_the_seed_decides() -> None:
    values = np.random.default_rng(4).normal(size=30)
    first, again, other = (Bootstrap(30, seed=s).estimate(mean(values)) for s in (7, 7, 8))
    assert first == again and first.value == other.value and first.low != other.low


def test_one_unit_has_no_interval() -> None:
    found = Bootstrap(1).estimate(mean([3.0]))
    assert (found.value, found.low, found.high) == (3, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": 0}, "at least one window or prompt, not 0"),
        ({"units": 3, "resamples": 99}, "at least 100 resamples, not 99"),
        ({"units": 3, "seed": -1}, "must not be negative: -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Bootstrap(**arguments)
