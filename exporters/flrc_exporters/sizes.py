"""Sizes of a bundle before anything is computed: the layout of the exporter itself, without a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flrc_runtime.manifest import RankPlan

from .architectures import DecoderConfig
from .layout import group_layouts
from .number_format import Formats, NumberFormat
from .own_form import own_bytes_read
from .weight_table import Stored, placed


@dataclass(frozen=True)
class BundleSize:
    """Bytes of ``weights.bin``, and of what a decode step of each stage reads of it."""

    file: int
    stages: tuple[int, ...]


def bundle_size(config: DecoderConfig, plan: RankPlan, *, context: int) -> BundleSize:
    """Return the sizes of the bundle that a plan with number formats is exported to.

    Args:
        config: The decoder.
        plan: Ranks and the number format of every matrix.
        context: Positions (tokens) that cosines and sines are stored for.
    """
    groups, formats = group_layouts(config, plan), Formats(NumberFormat.named(plan.embedding), 4)
    table = placed(config, plan, context=context)
    stages = (
        own_bytes_read(config, groups, stage=stage, formats=formats) for stage in range(plan.num_stages)
    )
    return BundleSize(table.size, tuple(stages))


def bytes_read(used: Sequence[Stored], vocab_size: int) -> int:
    """Return the bytes of weights a decode step of a stock graph reads: no rotary caches, one row of the embedding."""
    rows = [s for s in used if s.name.startswith("model.embed_tokens.")]
    rest = [s for s in used if s not in rows and not s.name.startswith("model.rotary.")]
    return sum(s.length for s in rest) + sum(s.length // vocab_size for s in rows)
