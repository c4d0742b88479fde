"""Pivoted storage of a low-rank matrix (PIFA, "Pivoting Factorization", ICML 2025, arXiv 2501.19090).

A matrix of rank r has ``r (m + n) - r²`` degrees of freedom: r of its rows, and every other row as a combination of
those. Column-pivoted QR picks rows that keep the coefficients small, so nothing is lost in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flrc_edge.errors import NumericalError


def pivot(U: Tensor, V: Tensor, *, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Store ``U V`` as pivot rows and coefficients.

    Args:
        U: ``[m, r]``, r <= m.
        V: ``[r, n]``.
        name: Used in error messages.

    Returns:
        ``rows: [r, n]`` and ``coefficients: [m - r, r]`` in the dtype of ``V``, and ``order: [m]`` int64 with
        ``(U V) = cat([rows, coefficients @ rows])[order]``.

    Raises:
        NumericalError: A factor is not finite.
    """
    from scipy.linalg import qr, solve_triangular  # heavy, and only compress pivots

    m, r = U.shape
    if not (torch.isfinite(U).all() and torch.isfinite(V).all()):
        raise NumericalError(f"{name}: a factor holds a value that is not finite")
    u = U.double().numpy()
    _, triangle, permutation = qr(u.T, mode="economic", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diagonal(triangle))
    # Directions that U does not have: the rows that stand for them are stored, and no other row needs them.
    rank = int((diagonal > diagonal[0] * 1e-10).sum())
    coefficients = np.zeros((m - r, r))
    coefficients[:, :rank] = solve_triangular(
        triangle[:rank, :rank], triangle[:rank, r:], check_finite=False
    ).T
    rows = U[torch.from_numpy(permutation[:r].astype(np.int64))].double() @ V.double()
    order = np.empty(m, np.int64)
    order[permutation] = np.arange(m)
    return (
        rows.to(V.dtype).contiguous(),
        torch.from_numpy(coefficients).to(V.dtype),
        torch.from_numpy(order),
    )
