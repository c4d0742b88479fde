"""A linear layer stored as chunks of low-rank factors, with a selectable stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flrc_edge.chunks import Chunk
from flrc_edge.errors import UsageError


class ChunkProduct(nn.Module):
    """One chunk: ``U (V x)``, or ``cat([z, U z])[order]`` with ``z = V x`` if pivoted (chunks.py)."""

    order: Tensor | None

    def __init__(self, chunk: Chunk) -> None:
        super().__init__()
        self.V = nn.Parameter(chunk.V, requires_grad=False)
        self.U = nn.Parameter(chunk.U, requires_grad=False)
        self.register_buffer("order", chunk.order)

    @property
    def rank(self) -> int:
        """Ranks of the chunk."""
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        """Size m of the output."""
        return self.U.shape[0] + (0 if self.order is None else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: ``[..., n] -> [..., m]``."""
        z = F.linear(x, self.V)  # (..., r)
        y = F.linear(z, self.U)
        return y if self.order is None else torch.cat([z, y], dim=-1)[..., self.order]

    def stored(self) -> Chunk:
        """Return the tensors as a chunk."""
        return Chunk(self.V.detach(), self.U.detach(), self.order)


class LowRankLinear(nn.Module):
    """``y = Σ_c chunk_c(x) + b`` over the chunks that make up the rank of the current stage.

    Args:
        chunks: First the one that every stage reads.
        bias: ``[m]`` or None.
        ranks: Rank of every stage, not growing; each ends where a chunk ends.
    """

    def __init__(
        self, chunks: Sequence[Chunk], bias: Tensor | None = None, *, ranks: tuple[int, ...]
    ) -> None:
        super().__init__()
        ends = list(accumulate(c.V.shape[0] for c in chunks))
        if not ranks or not set(ranks) <= set(ends):
            raise ValueError(f"ranks {ranks} must be given and end where a chunk ends: {ends}")
        self.chunks = nn.ModuleList(ChunkProduct(c) for c in chunks)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.ranks = ranks
        self._counts = tuple(ends.index(rank) + 1 for rank in ranks)
        self.stage = 0

    @property
    def in_features(self) -> int:
        """Size n of the input."""
        return self.stored()[0].V.shape[1]

    @property
    def out_features(self) -> int:
        """Size m of the output."""
        first = self.chunks[0]
        assert isinstance(first, ChunkProduct)
        return first.out_features

    def stored(self) -> tuple[Chunk, ...]:
        """Return the tensors of every chunk."""
        return tuple(c.stored() for c in self.chunks if isinstance(c, ChunkProduct))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the projection: ``[..., n] -> [..., m]``."""
        y: Tensor = self.chunks[0](x)
        for i in range(1, self._counts[self.stage]):
            y = y + self.chunks[i](x)
        return y if self.bias is None else y + self.bias

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
def low_rank_layer(linear: nn.Linear, chunks: Sequence[Chunk], *, ranks: tuple[int, ...]) -> LowRankLinear:
    """Build the layer that replaces ``linear``, in the dtype of its weight.

    Args:
        linear: The layer to replace; gives the bias.
        chunks: The stored tensors.
        ranks: One a stage.
    """
    dtype = linear.weight.dtype
    cast = [Chunk(c.V.to(dtype), c.U.to(dtype), c.order) for c in chunks]
    return LowRankLinear(cast, linear.bias, ranks=ranks)
