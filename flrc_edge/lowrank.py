"""A linear layer stored as nested low-rank factors, with a selectable stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flrc_edge.errors import UsageError


class LowRankLinear(nn.Module):
    """``y = U[:, :r] (V[:r] x) + b`` where r is the rank of the current stage.

    Args:
        U: ``[m, R]``.
        V: ``[R, n]``.
        bias: ``[m]`` or None.
        ranks: Rank of every stage, falling, the first at most R.
    """

    def __init__(self, U: Tensor, V: Tensor, bias: Tensor | None = None, *, ranks: tuple[int, ...]) -> None:
        super().__init__()
        if U.shape[1] != V.shape[0]:
            raise ValueError(f"U has {U.shape[1]} columns, V has {V.shape[0]} rows")
        if not ranks or max(ranks) > U.shape[1]:
            raise ValueError(f"ranks {ranks} must be given and at most {U.shape[1]}")
        self.U = nn.Parameter(U, requires_grad=False)
        self.V = nn.Parameter(V, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.ranks = ranks
        self.stage = 0

    @property
    def in_features(self) -> int:
        """Size n of the input."""
        return self.V.shape[1]

    @property
    def out_features(self) -> int:
        """Size m of the output."""
        return self.U.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the projection: ``[..., n] -> [..., m]``."""
        rank = self.ranks[self.stage]
        return F.linear(F.linear(x, self.V[:rank]), self.U[:, :rank], self.bias)

    def extra_repr(self) -> str:
        """Describe shape, ranks and stage for ``repr``."""
        return f"{self.in_features} -> {self.ranks} -> {self.out_features}, stage={self.stage}"


def set_stage(model: nn.Module, stage: int) -> None:
    """Make every low-rank layer of ``model`` compute with its ranks of ``stage``.

    Raises:
        UsageError: The model has no such stage.
    """
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    for layer in layers:
        if not 0 <= stage < len(layer.ranks):
            raise UsageError(f"stage {stage} does not exist: there are stages 0 to {len(layer.ranks) - 1}")
        layer.stage = stage


def replace_linear(model: nn.Module, name: str, layer: LowRankLinear) -> nn.Linear:
    """Put ``layer`` where the linear layer ``name`` is, and return that linear layer."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(child)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"{name} is {type(old).__name__}, not a linear layer")
    if (old.out_features, old.in_features) != (layer.out_features, layer.in_features):
        raise ValueError(f"{name} is {old}, the factors give {layer}")
    setattr(parent, child, layer)
    return old


@torch.no_grad()
def low_rank_layer(linear: nn.Linear, U: Tensor, V: Tensor, *, ranks: tuple[int, ...]) -> LowRankLinear:
    """Build the layer that replaces ``linear``, in the dtype of its weight.

    Args:
        linear: The layer to replace; gives the bias.
        U: ``[m, R]``, R at least the largest rank.
        V: ``[R, n]``.
        ranks: One a stage.
    """
    most, dtype = max(ranks), linear.weight.dtype
    return LowRankLinear(U[:, :most].to(dtype), V[:most].to(dtype), linear.bias, ranks=ranks)
