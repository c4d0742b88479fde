"""Integers for the stored matrices of a projection: each one makes up for the rounding of those before it.

Of a chunk, V is rounded first, with the error of ``V x`` compensated; U is fitted again, by least squares, to what
V has become and rounded for the inputs ``V̂ x`` it will get. A later chunk also takes what rounding the earlier ones
left. What is fitted is the product of the float factors, not the original matrix: the former minimises the loss, and
moments that say how to round would pull U away from that (SmolLM2-135M, pivoted, keep .8, int8: g .181 against .170,
.165 in floats).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flrc_edge.chunks import Chunk
from flrc_edge.quantization import QuantizedMatrix, quantize_compensated
from flrc_exporters.number_format import NumberFormat
from flrc_runtime.manifest import ProjectionPlan

RIDGE = 1e-6  # of the mean energy of ``V̂ x``, so that U is defined where V̂ has lost a direction


@dataclass(frozen=True)
class QuantizedProjection:
    """The stored matrices of a projection.

    Args:
        integers: By the names of :meth:`ProjectionPlan.matrices`, those with a format of integers.
        weight: What a dense projection's integers stand for, ``[m, n]``; None if it is factored.
        chunks: What a factored projection's integers stand for.
    """

    integers: dict[str, QuantizedMatrix]
    weight: Tensor | None
    chunks: tuple[Chunk, ...]


def quantize_projection(
    weight: Tensor | None, plan: ProjectionPlan, chunks: tuple[Chunk, ...], gram: Tensor
) -> QuantizedProjection:
    """Round the matrices of one projection to the formats of its plan.

    Args:
        weight: ``[m, n]`` of a dense projection; of a factored one it is not read.
        plan: Ranks, storage and number formats.
        chunks: Its float factors, if it is not dense.
        gram: ``[n, n]``: (weighted) second moments of its inputs.

    Raises:
        NumericalError: A matrix is not finite.
    """
    integers: dict[str, QuantizedMatrix] = {}

    def rounded(matrix: Tensor, name: str, metric: Tensor) -> Tensor:
        number_format = NumberFormat.named(plan.format_of(name) or "fp32")
        if not number_format.quantized:
            return matrix.float()
        integers[name] = quantize_compensated(matrix, metric, number_format, name=f"{plan.name}.{name}")
        return integers[name].dequantize()

    if plan.dense:
        assert weight is not None
        return QuantizedProjection(integers, rounded(weight, "weight", gram), ())
    gram = gram.double()
    left = torch.zeros(plan.shape, dtype=torch.float64)
    done = []
    for i, chunk in enumerate(chunks):
        left = left + product(Chunk(chunk.V.double(), chunk.U.double(), chunk.order))
        # Any basis of the latent space serves a plain chunk; in a random one all ranks are alike, and rounding one
        # can be compensated by all that follow (on SmolLM2 it leaves half the error of the sorted singular basis).
        basis = chunk.V if chunk.order is not None else rotation(len(chunk.V)) @ chunk.V.double()
        v = rounded(basis.float(), f"chunks.{i}.V", gram)
        energy = v.double() @ gram @ v.double().T  # E[z zᵀ] of z = V̂ x
        rows = slice(None) if chunk.order is None else _other_rows(chunk.order, len(v))
        u = fitted(left[rows], v.double(), gram, energy)
        u = rounded(u.float(), f"chunks.{i}.U", energy)
        done.append(Chunk(v, u, chunk.order))
        left = left - product(done[-1]).double()
    return QuantizedProjection(integers, None, tuple(done))


def rotation(rank: int) -> Tensor:
    """Return an orthogonal matrix ``[rank, rank]`` float64, always the same one."""
    generator = torch.Generator().manual_seed(rank)
    noise = torch.randn(rank, rank, dtype=torch.float64, generator=generator)
    basis: Tensor = torch.linalg.qr(noise).Q
    return basis


def fitted(target: Tensor, V: Tensor, gram: Tensor, energy: Tensor) -> Tensor:
    """Return the U of least ``E‖(target - U V) x‖²``.

    Args:
        target: ``[m, n]``.
        V: ``[r, n]``.
        gram: ``E[x xᵀ]: [n, n]``.
        energy: ``V gram Vᵀ: [r, r]``.
    """
    ridge = (RIDGE * energy.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    damped = energy + ridge * torch.eye(len(energy), dtype=energy.dtype)
    solution: Tensor = torch.linalg.solve(damped, V @ gram @ target.T).T
    return solution


def product(chunk: Chunk) -> Tensor:
    """Return the matrix ``[m, n]`` that a chunk stands for."""
    if chunk.order is None:
        return chunk.U @ chunk.V
    return torch.cat([chunk.V, chunk.U @ chunk.V])[chunk.order]


def _other_rows(order: Tensor, rank: int) -> Tensor:
    """Return the outputs, in stored order, that a pivoted chunk combines from its rows."""
    return order.argsort()[rank:]
