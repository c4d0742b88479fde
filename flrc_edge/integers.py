"""A whole plan in integers: every matrix with compensated rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flrc_edge.chunks import Chunk
from flrc_edge.embedding_rounding import EMBEDDING, is_tied, quantize_embedding
from flrc_edge.embedding_rounding import HEAD as HEAD_WEIGHT
from flrc_edge.input_grams import HEAD
from flrc_edge.progress import Progress, silent
from flrc_edge.quantization import QuantizedMatrix, round_to_nearest
from flrc_edge.quantized_factors import quantize_projection
from flrc_exporters.number_format import NumberFormat, rounded_plan
from flrc_exporters.refit import refitted
from flrc_runtime.manifest import RankPlan


def with_formats(plan: RankPlan, dtype: str, *, head: str, hidden_size: int) -> RankPlan:
    """Return the plan with one number format (such as ``int4/64``) for all projections, and one for the embedding.

    Blocks are shortened where a row would be padded (NumberFormat.fitted).
    """
    embedding = NumberFormat.named(head).fitted(hidden_size).name
    return rounded_plan(plan, NumberFormat.named(dtype), embedding=embedding)


def quantize_model(
    model: nn.Module,
    plan: RankPlan,
    chunks: Mapping[str, Sequence[Chunk]],
    grams: Mapping[str, Tensor],
    *,
    progress: Progress = silent,
) -> dict[str, QuantizedMatrix]:
    """Round every matrix of a plan to its number format.

    Args:
        model: The original model, or a compressed one in floats.
        plan: With number formats.
        chunks: Float factors of the factored projections.
        grams: ``[n, n]`` of every projection and of the head, from input_grams.py.
        progress: Called after every projection.

    Returns:
        Integers by the tensor name of a checkpoint.

    Raises:
        NumericalError: A matrix is not finite.
    """
    found: dict[str, QuantizedMatrix] = {}
    for done, p in enumerate(plan.projections, 1):
        weight = model.get_parameter(f"{p.name}.weight").detach() if p.dense else None
        result = quantize_projection(weight, p, tuple(chunks.get(p.name, ())), grams[p.name])
        found |= {f"{p.name}.{matrix}": integers for matrix, integers in result.integers.items()}
        progress("quantize", done, len(plan.projections))
    return found | quantize_head(model, plan, grams[HEAD])


def quantize_head(model: nn.Module, plan: RankPlan, gram: Tensor) -> dict[str, QuantizedMatrix]:
    """Round embedding and head to the plan's number format; nothing if that is of floats.

    Args:
        model: The original model.
        plan: With number formats.
        gram: ``E[h hᵀ]: [hidden size, hidden size]`` of the head's inputs.
    """
    number_format = NumberFormat.named(plan.embedding)
    return quantize_embedding(model, number_format, gram) if number_format.quantized else {}


def round_model(
    model: nn.Module, plan: RankPlan, chunks: Mapping[str, Sequence[Chunk]]
) -> dict[str, QuantizedMatrix]:
    """Round every matrix of a plan to nearest, as ``export --dtype`` does; what compensation is compared with.

    Args:
        model: The original model.
        plan: With number formats.
        chunks: Float factors of the factored projections.

    Returns:
        Integers by the tensor name of a checkpoint.
    """
    tensors = {f"{p.name}.weight": p.format_of("weight") for p in plan.projections if p.dense}
    matrices = {name: (model.get_parameter(name).detach(), f) for name, f in tensors.items()}
    for p in plan.projections:
        for i, chunk in enumerate(chunks.get(p.name, ())):
            v, u = (f"chunks.{i}.{part}" for part in "VU")
            coefficients = chunk.U
            if chunk.order is not None:
                to = NumberFormat.named(p.format_of(v))
                coefficients = torch.from_numpy(
                    refitted(chunk.U.float().numpy(), chunk.V.float().numpy(), to)
                )
            matrices[f"{p.name}.{v}"] = (chunk.V, p.format_of(v))
            matrices[f"{p.name}.{u}"] = (coefficients, p.format_of(u))
    embedded = [EMBEDDING] if is_tied(model) else [EMBEDDING, HEAD_WEIGHT]
    matrices |= {name: (model.get_parameter(name).detach(), plan.embedding) for name in embedded}
    found = {}
    for name, (matrix, named) in matrices.items():
        number_format = NumberFormat.named(named)
        if number_format.quantized:
            found[name] = round_to_nearest(matrix, number_format)
    return found
