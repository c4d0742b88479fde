"""What a compressed model will take, from its ``config.json`` alone.

Ranks are shared out evenly, by the allocator ``uniform``: measured ranks differ from projection to projection and fill
the same budgets. Sizes are those of the exporter's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flrc_edge import allocation
from flrc_edge.errors import UsageError
from flrc_edge.integers import with_formats
from flrc_exporters.architectures import DecoderConfig
from flrc_exporters.number_format import Integers
from flrc_exporters.own_form import cache_block_bytes, default_cache
from flrc_exporters.sizes import BundleSize, bundle_size
from flrc_runtime.decoder import MAX_CHUNK
from flrc_runtime.kv_cache import BLOCK_POSITIONS, KvShape
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Storage

# Beside weights and KV cache: python and onnxruntime, a word of the vocabulary, the nodes of a layer of one more stage.
# Found on SmolLM2-135M and the 0.5 B Qwen in seven forms each (`flrc-edge bench --loading`, docs/benchmarks.md).
PROGRAM_BYTES, BYTES_A_WORD, NODE_BYTES = 23_000_000, 250, 250_000
STEP = 8  # of ranks: one layer must meet a keep as closely as all layers together do in steps of 32


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Args:
        keep: Share of the projections' parameters it activates.
        parameters: That a decode step reads, embedding and norms left out.
        read_bytes: Of weights that a decode step reads.
    """

    keep: float
    parameters: int
    read_bytes: int


@dataclass(frozen=True)
class Estimate:
    """A bundle.

    Args:
        parameters: Of the model, a tied embedding counted once.
        projection_parameters: Of its projections.
        dtype: Number format of the projections.
        head: Number format of embedding and head.
        storage: Of factors.
        context: Positions (tokens) of the KV cache.
        dense_bytes: Of ``weights.bin`` at keep 1 in the same number formats.
        file_bytes: Of ``weights.bin``.
        kv_bytes: Of the KV cache, for 1000 tokens.
        memory_bytes: Of the process that decodes with all stages and a full KV cache.
        stages: In order.
        plan: Even ranks.
    """

    parameters: int
    projection_parameters: int
    dtype: str
    head: str
    storage: Storage
    context: int
    dense_bytes: int
    file_bytes: int
    kv_bytes: int
    memory_bytes: int
    stages: tuple[StageEstimate, ...]
    plan: RankPlan


def estimate(
    config: DecoderConfig,
    keep: Sequence[float],
    *,
    dtype: str = "int4",
    head: Integers = "int8",
    storage: Storage = "plain",
    context: int,
) -> Estimate:
    """Estimate a bundle.

    Args:
        config: The decoder.
        keep: Of each stage, falling.
        dtype: ``fp32`` or integers.
        head: Number format of embedding and head, if ``dtype`` is one of integers.
        storage: Of factors.
        context: Positions (tokens) of the KV cache.

    Raises:
        UsageError: The keeps do not fall, or one is too small.
    """
    plan = _even_plan(config, tuple(keep), storage)
    dense = _even_plan(config, (1.0,), storage)
    sizes = _sized(config, plan, dtype, head)
    kv = KvShape(
        config.num_layers,
        config.num_kv_heads,
        cache_block_bytes(config.head_dim, default_cache(dtype)),
        BLOCK_POSITIONS,
    )
    widths = config.hidden_size + config.intermediate_size
    program = (
        PROGRAM_BYTES
        + BYTES_A_WORD * config.vocab_size
        + NODE_BYTES * config.num_layers * (plan.num_stages - 1)
        + 4 * 4 * MAX_CHUNK * widths  # activations of a chunk of the prompt
    )
    return Estimate(
        parameters=config.parameters(),
        projection_parameters=plan.dense_parameters,
        dtype=dtype,
        head="fp32" if dtype == "fp32" else head,
        storage=storage,
        context=context,
        dense_bytes=_sized(config, dense, dtype, head).file,
        file_bytes=sizes.file,
        kv_bytes=kv.bytes_for(1000),
        memory_bytes=program + sizes.file + kv.bytes_for(context),  # the file is mapped
        stages=tuple(
            StageEstimate(plan.kept(i), plan.activated(i), size) for i, size in enumerate(sizes.stages)
        ),
        plan=plan,
    )


def largest_keep(fits: Callable[[float], bool], what: str) -> float:
    """Return the largest keep, in hundredths, that fits.

    Args:
        fits: Whether a keep does; a smaller one does then, too. May raise UsageError where it is too small for ranks.
        what: That it shall fit, for the error.

    Raises:
        UsageError: None fits.
    """
    if fits(1.0):
        return 1.0
    low, high = 0, 100  # high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        try:
            ok = fits(middle / 100)
        except UsageError:  # smaller than ranks can make it
            ok = True
        low, high = (middle, high) if ok else (low, middle)
    try:
        if low and fits(low / 100):
            return low / 100
    except UsageError:
        pass
    raise UsageError(
        f"no keep fits {what}: embedding, head and the smallest ranks take more",
        hint="try a --dtype of fewer bits, or a smaller model",
    )


def _even_plan(config: DecoderConfig, keep: tuple[float, ...], storage: Storage) -> RankPlan:
    """Return even ranks, those of the first layer for all of them: layers have the same shapes."""
    curves = allocation.uniform_curves(config.layer_shapes(), step=STEP, storage=storage)
    first = allocation.allocate(curves, keep, allocator="uniform")
    plans = tuple(
        ProjectionPlan(p.name, p.shape, pattern.ranks, pattern.storage)
        for p, pattern in zip(config.projections(), first.projections * config.num_layers, strict=True)
    )
    return RankPlan("uniform", keep, plans)


def _sized(config: DecoderConfig, plan: RankPlan, dtype: str, head: str) -> BundleSize:
    if dtype == "fp32":
        matrices = (replace(p, formats=("fp32",) * len(p.matrices())) for p in plan.projections)
        plan = replace(plan, projections=tuple(matrices), embedding="fp32")
    else:
        plan = with_formats(plan, dtype, head=head, hidden_size=config.hidden_size)
    return bundle_size(config, plan, context=config.export_context())
