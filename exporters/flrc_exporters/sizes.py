"""Sizes of a bundle before anything is computed: the layout of the exporter itself, without a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flrc_runtime.manifest import RankPlan

from .architectures import DecoderConfig
from .layout import group_layouts
from .number_format import Formats, NumberFormat
from .stages import attach_weights, build_stage
from .weight_table import Stored, placed


@dataclass(frozen=True)
class StageSize:
    """Bytes of one stage's weights.

    Args:
        read: That a decode step reads, as its graph file names them.
        packed: The same as onnxruntime packs them for its integer products, which is what memory holds.
    """

    read: int
    packed: int


@dataclass(frozen=True)
class BundleSize:
    """Bytes of ``weights.bin``, and of what each stage reads of it."""

    file: int
    stages: tuple[StageSize, ...]


def bundle_size(config: DecoderConfig, plan: RankPlan, *, context: int) -> BundleSize:
    """Return the sizes of the bundle that a plan with number formats is exported to.

    Args:
        config: The decoder.
        plan: Ranks and the number format of every matrix.
        context: Positions (tokens) that cosines and sines are stored for.
    """
    groups, formats = group_layouts(config, plan), Formats(NumberFormat.named(plan.embedding), 4)
    table = placed(config, plan, context=context)
    stages = []
    for stage in range(plan.num_stages):
        model = build_stage(config, groups, stage=stage, formats=formats, context=context)
        used = attach_weights(model, table.table, Path())
        read = bytes_read(used, config.vocab_size)
        stages.append(StageSize(read, read + _sums(used)))
    return BundleSize(table.size, tuple(stages))


def bytes_read(used: Sequence[Stored], vocab_size: int) -> int:
    """Return the bytes of weights a decode step reads: no rotary caches, one row of the embedding."""
    rows = [s for s in used if s.name.startswith("model.embed_tokens.")]
    rest = [s for s in used if s not in rows and not s.name.startswith("model.rotary.")]
    return sum(s.length for s in rest) + sum(s.length // vocab_size for s in rows)


def _sums(used: Sequence[Stored]) -> int:
    """Return what packing adds to integer products: of every block a sum and a second scale, float32."""
    return sum(8 * s.shape[0] * s.shape[1] for s in used if s.name.endswith(".qweight"))
