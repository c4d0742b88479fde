"""The low-rank layer and the switch between its stages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.errors import UsageError
from flrc_edge.lowrank import LowRankLinear, low_rank_layer, replace_linear, set_stage
from flrc_runtime.manifest import ProjectionPlan

U, V, BIAS = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate(((6, 4), (4, 5), (6,)))
)


def stored(*ranks: int, storage: Any = "plain") -> tuple[Chunk, ...]:
    return chunks_of(U, V, ProjectionPlan("p", (6, 5), ranks, storage=storage))


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("ranks", [(4, 2, 1), (3, 3, 2), (2, 2, 2)])
def test_each_stage_computes_with_its_ranks(bias: Any, storage: str, ranks: tuple[int, ...]) -> None:
    layer = LowRankLinear(stored(*ranks, storage=storage), bias, ranks=ranks)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(9))
    for stage, rank in enumerate(ranks):
        set_stage(layer, stage)
        expected = x @ (U[:, :rank] @ V[:rank]).T + (0 if bias is None else bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert (layer.in_features, layer.out_features) == (5, 6)
    assert f"5 -> {ranks} -> 6, stage=2" in repr(layer)
    assert not any(p.requires_grad for p in layer.parameters())


def test_stages_share_their_tensors() -> None:
    """Every stage reads the same parameters; the order of outputs is state, but nothing to train."""
    layer = LowRankLinear(stored(4, 2, 1, storage="pivoted"), BIAS, ranks=(4, 2, 1))
    plan = ProjectionPlan("p", (6, 5), (4, 2, 1), storage="pivoted")
    assert sum(p.numel() for p in layer.parameters()) == plan.parameters(0) + 6
    assert {n for n, _ in layer.named_buffers()} == {f"chunks.{i}.order" for i in range(3)}
    assert all(t.dtype == torch.int64 for n, t in layer.state_dict().items() if n.endswith("order"))
    other = LowRankLinear(stored(4, 2, 1, storage="pivoted"), torch.zeros(6), ranks=(4, 2, 1))
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.ones(1, 5)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    for chunk, tensors in zip(layer.stored(), stored(4, 2, 1, storage="pivoted"), strict=True):
        assert torch.equal(chunk.V, tensors.V) and torch.equal(chunk.U, tensors.U)
        assert torch.equal(chunk.order, tensors.order)  # type: ignore[arg-type]


def test_set_stage_reaches_every_layer_and_refuses_others() -> None:
    model = nn.Sequential(nn.Linear(5, 5), LowRankLinear(stored(4, 2), ranks=(4, 2)), nn.Linear(6, 5))
    model.append(nn.Sequential(LowRankLinear(stored(3, 1, storage="pivoted"), ranks=(3, 1))))
    set_stage(model, 1)
    assert [m.stage for m in model.modules() if isinstance(m, LowRankLinear)] == [1, 1]
    for stage in (2, -1):
        with pytest.raises(UsageError, match=f"stage {stage} does not exist: there are stages 0 to 1"):
            set_stage(model, stage)
    assert [m.stage for m in model.modules() if isinstance(m, LowRankLinear)] == [1, 1]


@pytest.mark.parametrize("ranks", [(5,), (4, 3), (4, 0), ()])
def test_ranks_must_end_where_chunks_end(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be given and end where a chunk ends: \[2, 4\]"):
        LowRankLinear(stored(4, 2), ranks=ranks)


def test_replace_linear() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(5, 6)})})
    linear = model.get_submodule("a.b")
    layer = low_rank_layer(linear, stored(2, 1), ranks=(2, 1))  # type: ignore[arg-type]
    shapes = [(c.V.shape, c.U.shape) for c in layer.stored()]
    assert shapes == [((1, 5), (6, 1))] * 2  # no more than the largest rank is kept
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
    assert replace_linear(model, "a.b", layer) is linear and model.get_submodule("a.b") is layer
    with pytest.raises(TypeError, match=r"a.b is LowRankLinear, not a linear layer"):
        replace_linear(model, "a.b", layer)
    model["a"]["b"] = nn.Linear(6, 5)  # type: ignore[index]
    with pytest.raises(ValueError, match="the factors give"):
        replace_linear(model, "a.b", layer)


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_is_kept(storage: str, dtype: torch.dtype) -> None:
    layer = low_rank_layer(nn.Linear(5, 6).to(dtype), stored(2, storage=storage), ranks=(2,))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.ones(1, 5, dtype=dtype)).dtype == dtype
    cast = LowRankLinear(stored(2, storage=storage), BIAS, ranks=(2,)).to(dtype)  # indices stay indices
    assert cast(torch.ones(1, 5, dtype=dtype)).dtype == dtype
