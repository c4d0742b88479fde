"""Ranks, storage form and number format of every matrix chosen together, within a budget of bytes a stage.

A choice loses what dropping ranks loses (a curve of allocation.py, in nats) and what rounding loses
(rounding_losses.py); the solver is that of the ranks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from flrc_edge.allocation import Curve, candidate_ranks, loss_by_rank, nested_forms
from flrc_edge.errors import UsageError
from flrc_edge.plan_solver import Choice, solve
from flrc_edge.rounding_losses import DENSE_FORMATS, EMBEDDING_FORMATS, FACTOR_FORMATS, RoundingLosses
from flrc_exporters.architectures import DecoderConfig
from flrc_exporters.number_format import NumberFormat, fitted_formats
from flrc_exporters.weight_table import file_size
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Storage

STAGED_RANKS = 12  # candidates a projection where there are several stages: forms grow with their square
ORDER_BYTES = 8  # of every output of a pivoted chunk
ATTEMPTS = 4


@dataclass(frozen=True)
class Formats:
    """The number formats that a plan may use: of dense matrices, of V and U, and of embedding and head."""

    dense: tuple[str, ...]
    factored: tuple[tuple[str, str], ...]
    embedding: tuple[str, ...]

    @classmethod
    def of(cls, dtype: str, head: str) -> Formats:
        """Return those of a ``compress --dtype`` and ``--head``."""
        if dtype == "mixed":
            return cls(DENSE_FORMATS, FACTOR_FORMATS, EMBEDDING_FORMATS)
        name = NumberFormat.named("fp32" if dtype == "float" else dtype).name
        finer = name.replace("int4", "int8")  # of pivoted U, see with_formats
        head = NumberFormat.named("fp32" if dtype == "float" else head).name
        return cls((name,), tuple(dict.fromkeys([(name, name), (name, finer)])), (head,))


def joint_plan(
    config: DecoderConfig,
    curves: Sequence[Sequence[Curve]],
    rounding: Mapping[str, RoundingLosses],
    embedding: Mapping[str, float],
    sizes: Sequence[int],
    *,
    allocator: str,
    scores: Mapping[str, float] | None = None,
) -> RankPlan:
    """Choose the plan of least predicted loss whose weight file has at most the first of ``sizes``.

    Args:
        config: The decoder.
        curves: For each storage form, one curve (nats) a projection in model order.
        rounding: What each number format costs each projection.
        embedding: What each number format costs embedding and head.
        sizes: Most bytes that the graph of each stage may read, falling; the first is the size of ``weights.bin``.
        allocator: Recorded in the plan.
        scores: Recorded in the plan.

    Raises:
        UsageError: The sizes do not fall, or one is below the smallest plan.
    """
    _check_fall(sizes)
    stages = len(sizes)
    rows = [
        _choices([form[i] for form in curves], rounding[curve.name], stages)
        for i, curve in enumerate(curves[0])
    ]
    vocab = (config.vocab_size, config.hidden_size)
    matrices = 1 if config.tied_embedding else 2
    rows.append(
        [
            Choice(
                (None,) * stages,
                (float(matrices * f.size(*vocab)),) * stages,
                stages * loss,
                formats=(f.name,),
            )
            for name, loss in embedding.items()
            for f in (NumberFormat.named(name).fitted(config.hidden_size),)
        ]
    )
    fixed = 0.0  # norms, rotary caches and the gaps between tensors: known once there is a plan
    for _ in range(ATTEMPTS):
        budgets = np.asarray(sizes, float) - fixed
        _check_least(sum(min(c.cost[-1] for c in row) for row in rows) + fixed, sizes)
        chosen = solve(rows, budgets)
        plan = _plan(curves[0], chosen, allocator=allocator, scores=scores or {})
        spent = sum(c.cost[0] for c in chosen)
        over = file_size(config, plan, context=config.export_context()) - sizes[0]
        if over <= 0 and fixed:
            return plan
        fixed = max(fixed, sizes[0] + over - spent)
    return plan


def check_sizes(
    config: DecoderConfig,
    sizes: Sequence[int],
    formats: Formats,
    *,
    storages: Sequence[Storage],
    step: int,
) -> None:
    """Check, before anything is computed, that the smallest plan fits every stage.

    Raises:
        UsageError: The sizes do not fall, or one is below what the smallest ranks and number formats take.
    """
    _check_fall(sizes)
    least = 0
    for p in config.projections():
        options = [NumberFormat.named(f).fitted(p.shape[1]).size(*p.shape) for f in formats.dense]
        for storage in storages:
            for rank in candidate_ranks(p.shape, step, storage=storage)[:1]:
                plan = ProjectionPlan(p.name, p.shape, (rank,), storage)
                options += [_bytes(plan, _fitted(plan, pair), 0) for pair in formats.factored]
        least += min(options)
    hidden = config.hidden_size
    vocab = min(
        NumberFormat.named(f).fitted(hidden).size(config.vocab_size, hidden) for f in formats.embedding
    )
    _check_least(least + vocab * (1 if config.tied_embedding else 2), sizes)


def _check_fall(sizes: Sequence[int]) -> None:
    if not sizes or any(a <= b for a, b in pairwise(sizes)):
        raise UsageError(
            f"the sizes of the stages must fall: {', '.join(f'{s / 1e6:.3g} MB' for s in sizes)}"
        )


def _check_least(least: float, sizes: Sequence[int]) -> None:
    if least > sizes[-1]:
        raise UsageError(
            f"{sizes[-1] / 1e6:.3g} MB is below {least / 1e6:.3g} MB, the least that the smallest ranks and number "
            "formats allow",
            hint="ask for a larger --target-size or a smaller --rank-step",
        )


def _choices(forms: Sequence[Curve], rounding: RoundingLosses, stages: int) -> list[Choice]:
    """Return every form of one projection in every number format, without those that another one beats."""
    shape, name = forms[0].shape, forms[0].name
    found = []
    for dense, loss in rounding.dense.items():
        f = NumberFormat.named(dense).fitted(shape[1])
        size = float(f.size(*shape))
        found.append(Choice((None,) * stages, (size,) * stages, stages * loss, formats=(f.name,)))
    for curve in forms:
        losses = loss_by_rank(curve)
        ranks = curve.ranks if stages == 1 else curve.ranks[:: -(-len(curve.ranks) // STAGED_RANKS) or 1]
        for ranks_of in nested_forms(ranks, shape, stages, storage=curve.storage):
            if ranks_of[0] is None:
                continue
            dropped = sum(losses[r] for r in ranks_of)
            plan = ProjectionPlan(name, shape, ranks_of, curve.storage)
            for pair, rounded in rounding.factored.get(curve.storage, {}).items():
                formats = _fitted(plan, pair)
                cost = tuple(float(_bytes(plan, formats, s)) for s in range(stages))
                found.append(Choice(ranks_of, cost, dropped + stages * rounded, curve.storage, formats))
    return _undominated(found)


def _fitted(plan: ProjectionPlan, pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the formats of a factored projection whose V and U shall have those of a pair."""
    v, u = map(NumberFormat.named, pair)
    return fitted_formats(plan, lambda matrix: u if matrix.endswith(".U") else v)


def _bytes(plan: ProjectionPlan, formats: Sequence[str], stage: int) -> int:
    """Return the bytes of what a stage reads of a factored projection."""
    rank = plan.ranks[stage]
    assert rank is not None
    total = 0
    shapes = list(plan.matrices().values())
    for i, (_, stop) in enumerate(plan.chunks()):
        if stop <= rank:
            pairs = zip(shapes[2 * i : 2 * i + 2], formats[2 * i : 2 * i + 2], strict=True)
            total += sum(NumberFormat.named(f).size(*shape) for shape, f in pairs)
            total += ORDER_BYTES * plan.shape[0] if plan.storage == "pivoted" else 0
    return total


def _undominated(choices: list[Choice]) -> list[Choice]:
    """Return the choices that no other one beats at every stage and in loss."""
    values = np.array([(*c.cost, c.loss) for c in choices])
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    for i in order:  # a choice can only be beaten by one that comes before it
        if not kept or not (values[kept] <= values[i]).all(axis=1).any():
            kept.append(int(i))
    return [choices[i] for i in kept]


def _plan(
    curves: Sequence[Curve], chosen: Sequence[Choice], *, allocator: str, scores: Mapping[str, float]
) -> RankPlan:
    *projections, embedding = chosen
    stored = tuple(
        ProjectionPlan(c.name, c.shape, choice.ranks, choice.storage, choice.formats)
        for c, choice in zip(curves, projections, strict=True)
    )
    stages = len(embedding.ranks)
    kept = RankPlan(allocator, (1.0,) * stages, stored, embedding=embedding.formats[0])
    # What was asked for is bytes; the share of parameters is what came of it, and cannot grow over the stages.
    keep = tuple(min(1.0, ceil(kept.kept(s) * 1e4) / 1e4) for s in range(stages))
    return RankPlan(allocator, keep, stored, dict(scores), embedding.formats[0])
