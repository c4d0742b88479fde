"""Rounding a matrix to integers so that its products, not its entries, change least.

Columns are rounded one after the other; what rounding one adds to the error of ``W x`` is taken off the columns that
follow, as far as their inputs are correlated (GPTQ, arXiv 2210.17323, in the form without an inverse: LDLQ of QuIP,
arXiv 2307.13304). With ``C = E[x xᵀ] = F D Fᵀ``, F unit upper triangular, the error is ``Σ_k D_k ‖target_k - ŵ_k‖²``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_exporters import block_scales
from flrc_exporters.number_format import (
    LEAST,
    SCALES,
    NumberFormat,
    dequantize,
    fit_powers,
    pack,
    quantize,
    reach,
)

DAMPING = 1e-2  # of the median energy of an input; the mean is that of a few massive tokens in some layers
SWEEPS = 2  # passes of coordinate descent after the first rounding
_ROWS = 4096  # rounded at once, so that temporaries stay small


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix ``[out, in]`` as integers, with one scale a block of inputs.

    Args:
        packed: ``[out, blocks, block · bits / 8]`` uint8, as number_format.py packs them.
        scales: ``[out, blocks]`` float32, such that a byte can hold each (block_scales.py).
        in_features: ``in``; the last block of a row may be padded.
        format: Bits and block.
    """

    packed: Tensor
    scales: Tensor
    in_features: int
    format: NumberFormat

    def dequantize(self) -> Tensor:
        """Return the matrix ``[out, in]`` float32 that the integers stand for."""
        values = dequantize(
            self.packed.numpy(), self.scales.numpy(), self.in_features, block=self.format.block_size
        )
        return torch.from_numpy(values.copy())


def round_to_nearest(weight: Tensor, number_format: NumberFormat) -> QuantizedMatrix:
    """Round every entry by itself.

    Args:
        weight: ``[out, in]``.
        number_format: Of integers.
    """
    bits = number_format.bits
    assert bits != 32
    packed, scales = quantize(weight.float().numpy(), bits, number_format.block_size)
    return QuantizedMatrix(torch.from_numpy(packed), torch.from_numpy(scales), weight.shape[1], number_format)


def quantize_compensated(
    weight: Tensor,
    gram: Tensor,
    number_format: NumberFormat,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    name: str = "",
) -> QuantizedMatrix:
    """Round a matrix with small ``E‖(W - Ŵ) x‖²``.

    Blocks with much energy come first, and inputs with much energy first in their block; scales are chosen block by
    block, by the error that rounding with them really leaves.

    Args:
        weight: ``[out, in]``.
        gram: ``E[x xᵀ]: [in, in]`` of its inputs.
        number_format: Of integers.
        damping: Added to the diagonal, as a share of its median.
        sweeps: Passes that round every column again, and fit every scale again, with all others as they are.
        name: Used in error messages.

    Raises:
        NumericalError: The weight or the Gram matrix is not finite.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(gram).all()):
        raise NumericalError(f"{name}: its weight or the statistics of its inputs are not finite")
    metric = damped(gram, damping)
    order = _blocks(metric.diagonal(), number_format.block_size)
    columns = torch.cat(order)
    metric = metric[columns][:, columns]
    sizes = [len(b) for b in order]
    parts = [
        _round_rows(rows[:, columns].T.contiguous(), metric, sizes, number_format.bits, sweeps)
        for rows in torch.split(weight.detach().float(), _ROWS)
    ]
    values, scales = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    return _packed(values, scales, order, number_format)


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Return a Gram matrix in float64 with a share of its median diagonal added, or the identity if it is zero."""
    diagonal = gram.diagonal().double()
    size = diagonal.median() if diagonal.median() > 0 else diagonal.mean()
    size = size if size > 0 else torch.ones((), dtype=torch.float64)
    return gram.double() + damping * size * torch.eye(len(gram), dtype=torch.float64)


def _blocks(energy: Tensor, block: int) -> list[Tensor]:
    """Return the columns of every block, in the order in which they are rounded."""
    blocks = [i[energy[i].argsort(descending=True)] for i in torch.split(torch.arange(len(energy)), block)]
    order = torch.stack([energy[i].mean() for i in blocks]).argsort(descending=True)
    return [blocks[i] for i in order.tolist()]


def _round_rows(
    weight: Tensor, metric: Tensor, sizes: list[int], bits: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Round the transposed matrix ``[in, out]`` in the order of its rows; returns integers and scales by block."""
    rows = weight.shape[1]
    root = torch.linalg.cholesky(metric.flip(0).flip(1)).flip(0).flip(1)  # upper: metric = root rootᵀ
    feedback = (root / root.diagonal()).float()
    cost = root.diagonal().square().float()
    error = torch.zeros_like(weight)  # W - Ŵ
    values = torch.empty_like(weight)
    scales = torch.empty(len(sizes), rows)
    start = 0
    for index, size in enumerate(sizes):
        stop = start + size
        target = weight[start:stop] + feedback[:start, start:stop].T @ error[:start]
        values[start:stop], scales[index], error[start:stop] = _round_block(
            weight[start:stop], target, feedback[start:stop, start:stop], cost[start:stop], bits
        )
        start = stop
    small = metric.float()
    for _ in range(sweeps):
        start = 0
        for index, size in enumerate(sizes):
            stop = start + size
            _improve_block(weight, error, values, scales[index], small, slice(start, stop), bits)
            start = stop
    return values, scales


def _round_block(
    weight: Tensor, target: Tensor, feedback: Tensor, cost: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a block ``[size, out]`` with every candidate scale and keep, for every output, the best one."""
    half = 1 << (bits - 1)
    size, rows = target.shape
    peak = target.gather(0, target.abs().argmax(0, keepdim=True))[0]
    base = torch.where(peak.abs() < LEAST, torch.ones_like(peak), peak / -reach(bits))
    scale = _rounded(torch.tensor(SCALES[bits])[:, None] * base)  # (candidates, out)
    error = torch.empty(size, *scale.shape)
    values = torch.empty(size, *scale.shape)
    loss = torch.zeros_like(scale)
    for j in range(size):
        wanted = target[j] + (feedback[:j, j] @ error[:j].flatten(1)).view_as(scale)
        values[j] = (wanted / scale).round_().clamp_(-half, half - 1)
        rounded = values[j] * scale
        loss += cost[j] * (wanted - rounded).square_()
        error[j] = weight[j] - rounded
    best = loss.argmin(0)
    pick = best.expand(size, 1, rows)
    return values.gather(1, pick)[:, 0], scale.gather(0, best[None])[0], error.gather(1, pick)[:, 0]


def _improve_block(
    weight: Tensor, error: Tensor, values: Tensor, scale: Tensor, metric: Tensor, block: slice, bits: int
) -> None:
    """Fit the scales of a block, then its columns one by one, with everything else as it is; in place."""
    half = 1 << (bits - 1)
    own = metric[block, block]
    outside = metric[block] @ error - own @ error[block]  # what the other columns' errors ask of this block
    q = values[block]
    fit = own @ q
    size = (q * fit).sum(0)
    best = (weight[block] * fit + q * outside).sum(0) / size.clamp_min(torch.finfo(torch.float32).tiny)
    usable = (size > 0) & (best.abs() > LEAST) & torch.isfinite(best)
    scale.copy_(torch.where(usable, _rounded(best.where(usable, scale)), scale))
    left = weight[block] - q * scale
    for j in range(len(q)):
        pull = outside[j] + own[j] @ left - own[j, j] * left[j]
        w = weight[block][j]
        q[j] = ((w + pull / own[j, j]) / scale).round_().clamp_(-half, half - 1)
        left[j] = w - q[j] * scale
    error[block] = left


def _packed(
    values: Tensor, scales: Tensor, order: list[Tensor], number_format: NumberFormat
) -> QuantizedMatrix:
    """Put columns and blocks back in place and pack them."""
    bits, block = number_format.bits, number_format.block_size
    assert bits != 32
    n, rows = values.shape
    half = 1 << (bits - 1)
    unsigned = torch.full((len(order) * block, rows), half, dtype=torch.uint8)
    unsigned[torch.cat(order)] = (values + half).to(torch.uint8)
    packed = pack(unsigned.T.reshape(rows, len(order), block).numpy(), bits)
    placed = torch.empty_like(scales)
    placed[[int(b[0]) // block for b in order]] = scales
    scales = placed.T.contiguous()
    fit_powers(packed, scales.numpy(), bits)
    return QuantizedMatrix(torch.from_numpy(packed), scales, n, number_format)


def _rounded(scales: Tensor) -> Tensor:
    return torch.from_numpy(block_scales.rounded(scales.numpy()))
