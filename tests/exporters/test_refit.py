"""Pivoted factors rounded to nearest: U makes up for what rounding did to V."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flrc_edge.pivoting import pivot
from flrc_exporters.number_format import NumberFormat, dequantize, quantize, rounded_plan
from flrc_exporters.refit import RefittedTensors, refitted
from flrc_exporters.source import CheckpointTensors
from flrc_runtime.manifest import read


def factors(m: int, r: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pivot rows and coefficients of a product whose directions are of very different sizes, as those of weights."""
    noise = torch.Generator().manual_seed(0)
    u, v = torch.randn(m, r, generator=noise), torch.randn(r, n, generator=noise)
    rows, coefficients, _ = pivot(u, v * torch.logspace(0, -1.5, r)[:, None])
    return coefficients.numpy(), rows.numpy()


@pytest.mark.parametrize(("name", "gain"), [("int4", 0.6), ("int8", 0.9)])
def test_less_is_lost(name: str, gain: float) -> None:
    u, v = factors(192, 64, 128)
    number_format = NumberFormat.named(name)
    assert number_format.bits != 32
    rounded = dequantize(*quantize(v, number_format.bits), v.shape[1])
    before = np.linalg.norm(u @ v - u @ rounded)
    after = np.linalg.norm(u @ v - refitted(u, v, number_format) @ rounded)
    assert after < gain * before


def test_nothing_to_fit() -> None:
    u, v = factors(24, 8, 32)
    assert refitted(u, v, NumberFormat.named("fp32")) is u
    assert refitted(u, np.zeros_like(v), NumberFormat.named("int4")) is u
    v[3] = 0  # a direction that V has not
    assert np.isfinite(refitted(u, v, NumberFormat.named("int4"))).all()


def test_of_a_checkpoint_only_u_of_pivoted_chunks_changes(
    pivoted_stories: Any, compressed_stories: Any
) -> None:
    int4 = NumberFormat.named("int4")
    for folder, changed in ((pivoted_stories.checkpoint, True), (compressed_stories.checkpoint, False)):
        plain = CheckpointTensors(folder)
        ours = RefittedTensors(
            folder, rounded_plan(read(folder, "checkpoint").plan, int4, embedding="int4/32")
        )
        names = {name for name in plain.names() if not name.endswith(".order")}
        different = {name for name in names if not np.array_equal(plain.read(name), ours.read(name))}
        assert different == {name for name in names if changed and name.endswith(".U")}
        for name in sorted(different)[:3]:
            assert np.array_equal(ours.read(name)[2:5], ours.read(name, slice(2, 5)))
