"""The allocator search: candidates, their measured KL, and the winner in the manifest."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge import selection
from flrc_edge.allocation import Curve
from flrc_edge.compression import compress
from flrc_edge.errors import UsageError
from flrc_edge.measurements import calibration_windows
from flrc_edge.settings import Settings
from flrc_runtime.manifest import ProjectionPlan, RankPlan, read


def test_search_picks_the_least_divergence_and_records_all(compressed_stories: Any, tmp_path: Path) -> None:
    settings = replace(
        compressed_stories.settings, keep=(0.7,), allocator="search", storage="pivoted", tokens=2048
    )
    compress(compressed_stories.source, tmp_path / "checkpoint", settings)
    plan = read(tmp_path / "checkpoint").plan
    assert plan.allocator == "search" and len(plan.candidates) == 3 + len(selection.SHARES)
    assert all(kl > 0 for kl in plan.candidates.values())
    assert abs(plan.kept(0) - 0.7) < 0.01


def test_held_out_windows_are_not_calibrated_on(compressed_stories: Any) -> None:
    settings = Settings(keep=(0.8,), tokens=4096, window=256, allocator="search")
    own, held = (
        calibration_windows(compressed_stories.source, settings, held_out=held).ids for held in (False, True)
    )
    assert len(own) == 14 and len(held) == 2
    assert not {tuple(w) for w in own.tolist()} & {tuple(w) for w in held.tolist()}
    with pytest.raises(UsageError, match="two calibration windows"):
        calibration_windows(compressed_stories.source, replace(settings, tokens=256))


def test_the_original_diverges_by_nothing_from_itself(compressed_stories: Any) -> None:
    loaded = compressed_stories.source
    ids = calibration_windows(loaded, Settings(keep=(0.8,), tokens=512, window=256)).ids
    plan = RankPlan("x", (1.0,), (ProjectionPlan("p", (2, 2), (None,)),))
    found = selection.select(loaded.model, {"a": plan}, ids, lambda _: nullcontext(loaded.model))
    assert found.candidates == {"a": pytest.approx(0, abs=1e-6)}


def test_mixed_curves() -> None:
    a = [Curve("p", (4, 4), (1,), (6.0, 0.0)), Curve("q", (4, 4), (1,), (2.0, 0.0))]
    b = [Curve("p", (4, 4), (1,), (1.0, 0.0)), Curve("q", (4, 4), (1,), (1.0, 0.0))]
    # The middle of two losses is the second: nothing to scale by. With three it is the middle rank.
    assert [c.losses for c in selection.mixed(a, b, share=0.5)] == [(3.0, 0.0), (1.0, 0.0)]
    a3 = [Curve("p", (8, 8), (1, 2), (9.0, 6.0, 0.0)), Curve("q", (8, 8), (1, 2), (3.0, 2.0, 0.0))]
    b3 = [Curve("p", (8, 8), (1, 2), (2.0, 1.0, 0.0)), Curve("q", (8, 8), (1, 2), (2.0, 1.0, 0.0))]
    mixed = selection.mixed(a3, b3, share=0.25)
    assert mixed[0].losses == pytest.approx((0.75 * 9 + 0.25 * 4 * 2, 0.75 * 6 + 0.25 * 4, 0))
    assert mixed[1].losses == pytest.approx((0.75 * 3 + 0.25 * 4 * 2, 0.75 * 2 + 0.25 * 4, 0))


def test_floored_curves_start_at_half_the_uniform_rank() -> None:
    curve = Curve("p", (64, 64), (8, 16, 24), (3.0, 2.0, 1.0, 0.0))
    assert selection._floored(curve, 24).ranks == (16, 24)
    assert selection._floored(curve, 8).ranks == curve.ranks
    assert selection._floored(curve, None).ranks == curve.ranks[:]  # no rank reaches half of the full one
    assert torch.tensor(selection._floored(curve, 24).losses).tolist() == [2.0, 1.0, 0.0]
