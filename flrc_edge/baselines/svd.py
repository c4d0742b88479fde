"""Plain truncated SVD of a weight: ``W ≈ U V`` of every rank with the least ``‖W - U V‖`` (Eckart and Young, 1936)."""

from __future__ import annotations

import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors


def svd_factors(weight: Tensor, *, name: str = "") -> Factors:
    """Factorize a weight without looking at data.

    Args:
        weight: ``[m, n]``.
        name: Used in error messages.

    Returns:
        Factors up to rank ``min(m, n)``. Their loss is in units of squared weight, not nats: the sum of the squared
        singular values left out, which is ``‖W - U V‖²`` (Frobenius).

    Raises:
        NumericalError: The weight is not finite, or its SVD does not converge.
    """
    u, values, vt = singular_triplets(weight.double(), name=name)
    return Factors(
        u.float().contiguous(), (values[:, None] * vt).float().contiguous(), values.square(), loss_scale=1.0
    )


def singular_triplets(matrix: Tensor, *, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U: [m, k]``, singular values ``[k]``, falling, and ``Vᵀ: [k, n]``, k = min(m, n).

    Raises:
        NumericalError: A value is not finite, or the SVD does not converge; never a made-up result.
    """
    if not torch.isfinite(matrix).all():
        raise NumericalError(f"{name}: its weight holds a value that is not finite")
    try:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise NumericalError(f"{name}: its SVD did not converge") from error
    return u, values, vt
