"""The stored tensors of a factored projection: one pair of matrices per block of ranks, plain or pivoted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flrc_edge.pivoting import pivot
from flrc_runtime.manifest import ProjectionPlan


@dataclass(frozen=True)
class Chunk:
    """A block of r ranks: ``z = V x``, then ``y = U z``, or pivoted ``y = cat([z, U z])[order]``.

    Args:
        V: ``[r, n]``.
        U: ``[m, r]``, pivoted ``[m - r, r]``.
        order: ``[m]`` int64 if pivoted: which entry of ``cat([z, U z])`` each output is.
    """

    V: Tensor
    U: Tensor
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.V.shape[0]
        if self.U.shape[1] != rank:
            raise ValueError(f"U has {self.U.shape[1]} columns, V has {rank} rows")
        if self.order is not None and len(self.order) != len(self.U) + rank:
            raise ValueError(f"order names {len(self.order)} outputs, V and U give {len(self.U) + rank}")


def chunks_of(U: Tensor, V: Tensor, plan: ProjectionPlan) -> tuple[Chunk, ...]:
    """Cut nested factors into the chunks of a plan.

    Args:
        U: ``[m, R]``, R at least the largest rank of the plan.
        V: ``[R, n]``.
        plan: Of the projection.

    Raises:
        NumericalError: A factor to be pivoted is not finite.
    """
    result = []
    for start, stop in plan.chunks():
        u, v = U[:, start:stop].contiguous(), V[start:stop].contiguous()
        if plan.storage == "plain":
            result.append(Chunk(v, u))
        else:
            rows, coefficients, order = pivot(u, v, name=plan.name)
            result.append(Chunk(rows, coefficients, order))
    return tuple(result)
