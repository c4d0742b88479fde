"""Chunks: nested factors cut into the blocks of a plan, whose products add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.errors import NumericalError
from flrc_runtime.manifest import ProjectionPlan

SHAPES = {"wide": (8, 20), "square": (12, 12), "tall": (20, 8)}


def nested(m: int, n: int) -> tuple[Tensor, Tensor]:
    """U and V of every rank of a random matrix, in float64."""
    weight = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def product(chunk: Chunk) -> Tensor:
    """What a chunk multiplies with: ``[m, n]``."""
    rows = chunk.U @ chunk.V
    return rows if chunk.order is None else torch.cat([chunk.V, rows])[chunk.order]


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ranks", [(5,), (8,), (8, 8), (6, 2), (8, 3), (7, 4, 4, 1), (8, 7, 6)])
def test_the_chunks_of_a_stage_add_up_to_its_rank(
    storage: Any, shape: tuple[int, int], ranks: tuple[int, ...]
) -> None:
    u, v = nested(*shape)
    plan = ProjectionPlan("p", shape, ranks, storage=storage)
    chunks = chunks_of(u, v, plan)
    assert [len(c.V) for c in chunks] == [stop - start for start, stop in plan.chunks()]
    for stage, rank in enumerate(ranks):
        read = [c for c, (_, stop) in zip(chunks, plan.chunks(), strict=True) if stop <= rank]
        got = torch.stack([product(c) for c in read]).sum(0)
        assert torch.allclose(got, u[:, :rank] @ v[:rank], atol=1e-12)
        assert sum(c.U.numel() + c.V.numel() for c in read) == plan.parameters(stage)
    for chunk in chunks:
        assert chunk.U.is_contiguous() and chunk.V.is_contiguous()
        assert (chunk.order is None) == (storage == "plain")


def test_plain_chunks_are_cuts() -> None:
    u, v = nested(8, 20)
    a, b = chunks_of(u, v, ProjectionPlan("p", (8, 20), (5, 2)))
    assert torch.equal(a.U, u[:, :2]) and torch.equal(b.U, u[:, 2:5])
    assert torch.equal(a.V, v[:2]) and torch.equal(b.V, v[2:5])


def test_a_dense_projection_has_none() -> None:
    assert chunks_of(*nested(8, 20), ProjectionPlan("p", (8, 20), (None, None))) == ()


def test_the_projection_that_is_not_finite_is_named() -> None:
    u, v = nested(8, 20)
    v[4, 3] = float("nan")
    chunks_of(u, v, ProjectionPlan("a.b", (8, 20), (4,), storage="pivoted"))  # not part of it
    with pytest.raises(NumericalError, match=r"^a.b: a factor holds a value that is not finite"):
        chunks_of(u, v, ProjectionPlan("a.b", (8, 20), (5, 2), storage="pivoted"))


def test_shapes_must_fit() -> None:
    u, v = nested(8, 20)
    with pytest.raises(ValueError, match="U has 4 columns, V has 3 rows"):
        Chunk(v[:3], u[:, :4])
    with pytest.raises(ValueError, match="order names 8 outputs, V and U give 11"):
        Chunk(v[:3], u[:, :3], torch.arange(8))
