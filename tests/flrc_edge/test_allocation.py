"""What the rules think a rank is worth, which ranks there are to choose from, and keeps that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flrc_edge.allocation import (
    MOST_RANKS,
    allocate,
    candidate_ranks,
    check_feasible,
    check_keep,
    fisher_curves,
    fisher_scores,
    uniform_curves,
)
from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_runtime.manifest import break_even

SHAPES = {"q": (576, 576), "k": (192, 576), "gate": (1536, 576), "down": (576, 1536)}


def moments_with(g2: float, gw2: float) -> Moments:
    return Moments(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, g2, gw2)


both_storages = pytest.mark.parametrize("storage", ["plain", "pivoted"])


def test_fisher_ranks_are_proportional_to_scores() -> None:
    shapes = {f"p{i}": (m, n) for i, (m, n) in enumerate([(512, 512), (256, 1024), (1024, 256), (512, 768)])}
    scores = dict(zip(shapes, [1.0, 2.0, 1.5, 3.0], strict=True))
    moments = {n: moments_with(1.0, s) for n, s in scores.items()}
    curves = fisher_curves(shapes, moments, step=4)
    plan = allocate(curves, (0.35,), allocator="fisher", scores=scores)
    unit = [p.ranks[0] / scores[p.name] for p in plan.projections]  # type: ignore[operator]
    assert max(unit) - min(unit) <= 8 and min(unit) > 20
    assert plan.scores == scores


def test_pivoted_fisher_parameters_are_proportional_to_scores() -> None:
    shapes = {f"p{i}": (m, n) for i, (m, n) in enumerate([(512, 512), (256, 1024), (1024, 256), (512, 768)])}
    scores = dict(zip(shapes, [1.0, 2.0, 1.5, 3.0], strict=True))
    moments = {n: moments_with(1.0, s) for n, s in scores.items()}
    curves = fisher_curves(shapes, moments, step=4, storage="pivoted")
    plan = allocate(curves, (0.35,), allocator="fisher")
    unit = [p.parameters(0) / (sum(p.shape) * scores[p.name]) for p in plan.projections]
    assert max(unit) - min(unit) <= 8 and min(unit) > 20


def test_a_clamped_fisher_rank_leaves_the_rest_proportional() -> None:
    shapes = {f"p{i}": (512, 512) for i in range(4)}
    scores = dict(zip(shapes, [1.0, 2.0, 3.0, 1e4], strict=True))
    moments = {n: moments_with(1.0, s) for n, s in scores.items()}
    plan = allocate(fisher_curves(shapes, moments, step=4), (0.5,), allocator="fisher")
    assert plan.projections[3].dense  # clamped at what is worth storing
    ranks = [p.ranks[0] for p in plan.projections[:3]]
    unit = [r / s for r, s in zip(ranks, [1.0, 2.0, 3.0], strict=True)]  # type: ignore[operator]
    assert max(unit) - min(unit) <= 8 and plan.kept(0) > 0.495


def test_score_variants() -> None:
    shapes = {"a": (4, 6)}
    moments = {"a": moments_with(g2=48.0, gw2=96.0)}
    expected = {"gw2": 96.0, "gw2-rms": 2.0, "g2-sum": 48.0, "g2-mean": 2.0, "g2-rms": 2**0.5}
    for score, value in expected.items():
        assert fisher_scores(shapes, moments, score=score)["a"] == pytest.approx(value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="score 'best' is not one of gw2"):
        fisher_scores(shapes, moments, score="best")  # type: ignore[arg-type]


@both_storages
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (8192, 28672), (7, 7), (1, 5)])
def test_candidate_ranks(shape: tuple[int, int], storage: Any) -> None:
    ranks = candidate_ranks(shape, storage=storage)
    most = break_even(shape, storage=storage)
    assert len(ranks) <= MOST_RANKS and all(r % 32 == 0 for r in ranks)
    assert all(r <= most for r in ranks)
    if most >= 32:
        assert ranks[0] >= 32 and ranks[-1] > most - ranks[0]


def test_pivoting_allows_what_plain_factors_cannot() -> None:
    """Rank 32 of 64: plain as many parameters as the matrix, pivoted three quarters of them."""
    check_feasible([(64, 64)], (0.75,), storage="pivoted")
    for keep, storage, least in ((0.74, "pivoted", "0.750"), (0.75, "plain", "1.000")):
        with pytest.raises(UsageError, match=f"keep {keep} is below {least}, the least that ranks of"):
            check_feasible([(64, 64)], (keep,), storage=storage)  # type: ignore[arg-type]
    plan = allocate(uniform_curves({"p": (64, 64)}, storage="pivoted"), (0.75,), allocator="uniform")
    assert plan.projections[0].ranks == (32,) and plan.kept(0) == 0.75


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
        allocate(uniform_curves(SHAPES), keep, allocator="uniform")


def test_a_keep_no_rank_allows_says_which_would_do() -> None:
    with pytest.raises(UsageError, match=r"keep 0.01 is below 0\.\d+, the least that ranks of 32 allow"):
        allocate(uniform_curves(SHAPES), (0.5, 0.01), allocator="uniform")
