"""The form in which factors are trained: every chunk as plain balanced factors, ``UᵀU = V Vᵀ`` (Tu et al. 2016).

Pivoted factors train badly: a change of a pivot row is copied, enlarged, into all the rows that are combinations of
it. SmolLM2-135M takes a three times larger learning rate balanced. The product, and so the model, is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flrc_edge.chunks import Chunk
from flrc_edge.lowrank import ChunkProduct, LowRankLinear
from flrc_edge.pivoting import pivot


@torch.no_grad()
def balance(model: nn.Module) -> None:
    """Bring every chunk of a compressed model into plain balanced factors, in place."""
    for module in model.modules():
        if isinstance(module, ChunkProduct):
            module.U.data, module.V.data = balanced(module.stored())
            module.order = None


def balanced(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return ``U: [m, r]`` and ``V: [r, n]`` of the same product, with ``UᵀU = V Vᵀ`` diagonal.

    Args:
        chunk: Plain or pivoted, r <= min(m, n).
    """
    u = chunk.U.double()
    if chunk.order is not None:
        u = torch.cat([torch.eye(u.shape[1], dtype=u.dtype, device=u.device), u])[chunk.order]
    # U V = (Q_u R_u) (Q_v R_v)ᵀ, so its singular vectors are those of the small R_u R_vᵀ.
    q_u, r_u = torch.linalg.qr(u)
    q_v, r_v = torch.linalg.qr(chunk.V.double().T)
    left, values, right = torch.linalg.svd(r_u @ r_v.T)
    root = values.sqrt()
    new_u, new_v = q_u @ left * root, root[:, None] * (right @ q_v.T)
    return new_u.to(chunk.U.dtype).contiguous(), new_v.to(chunk.V.dtype).contiguous()


@torch.no_grad()
def stored_tensors(model: nn.Module, pivoted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every chunk in the form a checkpoint stores.

    Args:
        model: A compressed model whose chunks are plain factors.
        pivoted: The projections whose chunks are to be pivoted; U of the others gets unit columns.

    Raises:
        NumericalError: A factor to be pivoted is not finite.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LowRankLinear):
            continue
        for i, chunk in enumerate(layer.stored()):
            place = f"{name}.chunks.{i}"
            if name in pivoted:
                rows, coefficients, order = pivot(chunk.U, chunk.V, name=name)
                yield from ((f"{place}.V", rows), (f"{place}.U", coefficients), (f"{place}.order", order))
            else:
                norms = chunk.U.norm(dim=0).clamp(min=torch.finfo(chunk.U.dtype).tiny)
                yield from ((f"{place}.V", chunk.V * norms[:, None]), (f"{place}.U", chunk.U / norms))
