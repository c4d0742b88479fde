"""A whole plan in integers: every projection with compensated rounding, embedding and head to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flrc_edge.chunks import Chunk
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.quantization import QuantizedMatrix, round_to_nearest
from flrc_edge.quantized_factors import quantize_projection
from flrc_exporters.number_format import Dtype, NumberFormat
from flrc_runtime.manifest import RankPlan


def with_formats(plan: RankPlan, dtype: Dtype, *, head: Dtype) -> RankPlan:
    """Return the plan with one number format for every projection, and one for embedding and head."""
    chosen = NumberFormat.named(dtype).name
    projections = tuple(replace(p, formats=(chosen,) * len(p.matrices())) for p in plan.projections)
    return replace(plan, projections=projections, embedding=NumberFormat.named(head).name)


def quantize_model(
    loaded: LoadedModel,
    plan: RankPlan,
    chunks: Mapping[str, Sequence[Chunk]],
    grams: Mapping[str, Tensor],
    *,
    progress: Progress = silent,
) -> dict[str, QuantizedMatrix]:
    """Round every matrix of a plan to its number format.

    Args:
        loaded: The original model.
        plan: With number formats.
        chunks: Float factors of the factored projections.
        grams: ``[n, n]`` of every projection, from input_grams.py.
        progress: Called after every projection.

    Returns:
        Integers by the tensor name of a checkpoint.

    Raises:
        NumericalError: A matrix is not finite.
    """
    found: dict[str, QuantizedMatrix] = {}
    for done, p in enumerate(plan.projections, 1):
        weight = loaded.model.get_parameter(f"{p.name}.weight").detach()
        result = quantize_projection(weight, p, tuple(chunks.get(p.name, ())), grams[p.name])
        found |= {f"{p.name}.{matrix}": integers for matrix, integers in result.integers.items()}
        progress("quantize", done, len(plan.projections))
    number_format = NumberFormat.named(plan.embedding)
    if number_format.quantized:
        names = ["model.embed_tokens.weight"]
        if not loaded.config.tied_embedding:
            names.append("lm_head.weight")
        found |= {n: round_to_nearest(loaded.model.get_parameter(n).detach(), number_format) for n in names}
    return found
