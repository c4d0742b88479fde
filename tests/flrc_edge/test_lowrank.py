"""The low-rank layer and the switch between its stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flrc_edge.errors import UsageError
from flrc_edge.lowrank import LowRankLinear, low_rank_layer, replace_linear, set_stage

U, V, BIAS = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate(((6, 4), (4, 5), (6,)))
)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_each_stage_computes_with_its_ranks(bias: torch.Tensor | None) -> None:
    layer = LowRankLinear(U, V, bias, ranks=(4, 2, 1))
    x = torch.randn(2, 3, 5)
    for stage, rank in enumerate((4, 2, 1)):
        set_stage(layer, stage)
        expected = x @ (U[:, :rank] @ V[:rank]).T + (0 if bias is None else bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert (layer.in_features, layer.out_features) == (5, 6)
    assert "5 -> (4, 2, 1) -> 6, stage=2" in repr(layer)
    assert not any(p.requires_grad for p in layer.parameters())


def test_set_stage_reaches_every_layer_and_refuses_others() -> None:
    model = nn.Sequential(nn.Linear(5, 5), LowRankLinear(U, V, ranks=(4, 2)), nn.Linear(6, 5))
    model.append(nn.Sequential(LowRankLinear(U, V, ranks=(3, 1))))
    set_stage(model, 1)
    assert [m.stage for m in model.modules() if isinstance(m, LowRankLinear)] == [1, 1]
    for stage in (2, -1):
        with pytest.raises(UsageError, match=f"stage {stage} does not exist: there are stages 0 to 1"):
            set_stage(model, stage)
    assert [m.stage for m in model.modules() if isinstance(m, LowRankLinear)] == [1, 1]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="U has 4 columns, V has 3 rows"):
        LowRankLinear(U, V[:3], ranks=(3,))
    for ranks in ((5,), ()):
        with pytest.raises(ValueError, match="must be given and at most 4"):
            LowRankLinear(U, V, ranks=ranks)


def test_replace_linear() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(5, 6)})})
    linear = model.get_submodule("a.b")
    layer = low_rank_layer(linear, U, V, ranks=(2, 1))  # type: ignore[arg-type]
    assert layer.U.shape == (6, 2) and layer.V.shape == (2, 5)  # no more than the largest rank is kept
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
    assert replace_linear(model, "a.b", layer) is linear and model.get_submodule("a.b") is layer
    with pytest.raises(TypeError, match=r"a.b is LowRankLinear, not a linear layer"):
        replace_linear(model, "a.b", layer)
    model["a"]["b"] = nn.Linear(6, 5)  # type: ignore[index]
    with pytest.raises(ValueError, match="the factors give"):
        replace_linear(model, "a.b", layer)


def test_the_dtype_of_the_model_is_kept() -> None:
    layer = low_rank_layer(nn.Linear(5, 6).to(torch.bfloat16), U, V, ranks=(2,))
    assert layer(torch.ones(1, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
