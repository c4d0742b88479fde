"""Nested low-rank factors of a projection and the loss of every rank, from one eigendecomposition.

``W: [m, n] ≈ U[:, :r] V[:r]``; every smaller rank is a prefix. With ``C = E[x xᵀ]`` and ``H = E[g gᵀ]``:

* one-sided (activation-aware, as SVD-LLM, arXiv 2403.07378): minimises ``E‖(W - Ŵ) x‖²``; loss ``Σ_{i>r} λ_i``;
* two-sided (gradient-aware, the K-FAC approximation, arXiv 1503.05671): minimises ``½ tr(H ΔW C ΔWᵀ)``, the
  predicted growth of the token loss, with H damped; loss ``½ Σ_{i>r} λ_i`` nats.

No Cholesky factor and no inverse of a Gram matrix of activations is needed where m <= n; where m > n only a
damped square root of ``C`` is inverted. Both need Gram matrices of the smaller side only (calibration.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from flrc_edge.calibration import Moments
from flrc_edge.errors import NumericalError, UsageError
from flrc_runtime.manifest import Storage, break_even

Method = Literal["one-sided", "two-sided"]
DAMPING = (
    3e-2  # of the mean diagonal of H; measured on SmolLM2-135M among 1e-2, 3e-2, 1e-1: best for plain storage
)
INPUT_DAMPING = 1e-6  # of the mean diagonal of E[x xᵀ], so that its square root can be inverted


@dataclass(frozen=True)
class Factors:
    """Factors of one projection up to the largest useful rank R, and the loss of every rank.

    Args:
        U: ``[m, R]`` float32, columns of unit length (so that a quantized block of U has one scale).
        V: ``[R, n]`` float32, its rows carry the size.
        spectrum: ``[min(m, n)]`` float64, falling: the loss that each direction removes, in units of the metric.
        loss_scale: Multiplies a sum of ``spectrum`` into nats per token.
        measured: ``[R + 1]`` float64: the growth of the token loss (nats) at ranks 0 to R as measured.py found it.
    """

    U: Tensor
    V: Tensor
    spectrum: Tensor
    loss_scale: float
    measured: Tensor | None = None

    def metric(self, rank: int) -> float:
        """Return the loss of keeping ``rank`` directions in the units of the metric that was minimised."""
        return self.spectrum[rank:].sum().item()

    def loss(self, rank: int) -> float:
        """Return the predicted growth of the token loss (nats) at ``rank``."""
        return self.loss_scale * self.metric(rank)


def factorize(
    weight: Tensor,
    moments: Moments,
    *,
    method: Method = "two-sided",
    storage: Storage = "plain",
    damping: float = DAMPING,
    name: str = "",
) -> Factors:
    """Factorize one projection up to the largest rank that its storage form can use.

    Args:
        weight: ``[m, n]``.
        moments: Its statistics.
        method: ``one-sided`` or ``two-sided``.
        storage: Plain factors are useful below break-even, pivoted ones up to the full rank.
        damping: Share of the mean diagonal of H added to it (two-sided).
        name: Used in error messages.

    Raises:
        NumericalError: A statistic or the weight is not finite, or eigenvalues did not converge.
        UsageError: The method is unknown.
    """
    if method not in get_args(Method):
        raise UsageError(f"factorization {method!r} is not one of {', '.join(get_args(Method))}")
    for what, tensor in (("weight", weight), ("energy", moments.energy), ("gradient", moments.gradient)):
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{name}: its {what} holds a value that is not finite")
    if not isfinite(moments.gradient_trace):
        raise NumericalError(f"{name}: its gradient trace is not finite")
    w = weight.double()
    m, n = w.shape
    rank = largest_rank((m, n), storage)
    mean_gradient = moments.gradient_trace / m
    if method == "one-sided":
        one_sided = _one_sided_wide if m <= n else _one_sided_tall
        solve = partial(one_sided, w, moments.energy, rank)
        scale = 0.5 * mean_gradient
    else:
        moments = replace(moments, energy=mixed_energy(moments))
        delta = damping * mean_gradient if mean_gradient > 0 else 1.0
        two_sided = _two_sided_wide if m <= n else _two_sided_tall
        solve = partial(two_sided, w, moments, rank, delta)
        scale = 0.5 if mean_gradient > 0 else 0.0  # without any gradient H is only the damping
    try:
        left, right, spectrum = solve()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not list it
        raise NumericalError(
            f"{name}: the eigenvalues of its statistics did not converge", hint="calibrate on more tokens"
        ) from error
    size = left.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return Factors(
        (left / size).float().contiguous(), (right * size[:, None]).float().contiguous(), spectrum, scale
    )


def largest_rank(shape: tuple[int, int], storage: Storage) -> int:
    """Return the largest rank that a storage form can use: plain ones below break-even, pivoted ones the full one."""
    return min(shape) if storage == "pivoted" else break_even(shape)


def mixed_energy(moments: Moments) -> Tensor:
    """Return the energy that two-sided factors are fitted to: half plain, half weighed by the gradients' energy.

    ``E[(gᵀ ΔW x)²]`` asks for weighed tokens where ``‖g‖`` and x depend on each other. But a few massive tokens, on
    which the loss hardly depends to second order, break the model once they change much: the plain half holds them.
    """
    if moments.weighted is None:
        return moments.energy
    return (moments.energy + moments.weighted) / 2


def _one_sided_wide(w: Tensor, energy: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """m <= n: the eigenvectors of ``E[y yᵀ]`` are the left singular vectors of ``W C^½``."""
    spectrum, u = _eigh(energy)
    u = u[:, :rank]
    return u, u.T @ w, spectrum


def _one_sided_tall(w: Tensor, energy: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """m > n: left singular vectors from the small side, ``W C^½ = U Λ^½ Zᵀ``."""
    root, _ = _square_roots(energy)
    d = w @ root  # (m, n)
    spectrum, z = _eigh(d.T @ d)
    # QR keeps the columns orthonormal where Λ is so small that dividing by it would not.
    u = torch.linalg.qr(d @ z[:, :rank]).Q
    return u, u.T @ w, spectrum


def _two_sided_wide(w: Tensor, moments: Moments, rank: int, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """m <= n: ``H^½ E[y yᵀ] H^½ = U Λ Uᵀ``; factors ``H^-½ U`` and ``Uᵀ H^½ W``."""
    h = moments.gradient + delta * torch.eye(len(w), dtype=w.dtype)
    root, inverse = _square_roots(h)
    spectrum, u = _eigh(root @ moments.energy @ root)
    u = u[:, :rank]
    return inverse @ u, u.T @ root @ w, spectrum


def _two_sided_tall(w: Tensor, moments: Moments, rank: int, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """m > n: ``C^½ M C^½ = Z Λ Zᵀ`` with ``M = Wᵀ H W``; factors ``W C^½ Z`` and ``Zᵀ C^-½``."""
    n = w.shape[1]
    mean = moments.energy.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    c = moments.energy + INPUT_DAMPING * mean * torch.eye(n, dtype=w.dtype)
    root, inverse = _square_roots(c)
    spectrum, z = _eigh(root @ (moments.gradient + delta * (w.T @ w)) @ root)
    z = z[:, :rank]
    return w @ (root @ z), z.T @ inverse, spectrum


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (falling, not below 0) and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix: ``[n, n]`` float64."""
    return _square_roots(matrix.double())[0]


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root and its pseudo-inverse."""
    values, vectors = _eigh(matrix)
    root = values.sqrt()
    usable = root > root[0] * 1e-12
    inverse = torch.where(usable, 1 / root.where(usable, torch.ones_like(root)), torch.zeros_like(root))
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
