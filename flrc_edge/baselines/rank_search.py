"""ASVD's sensitivity-based truncation rank search, STRS (arXiv 2312.05821, section 3.4; ASVD4LLM).

Every projection is truncated alone at every parameter ratio and the perplexity of the whole model measured. Then all
truncations at or below one perplexity are applied, that threshold found by bisection so that the budget is met.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf

import numpy as np
from torch import Tensor

from flrc_edge.allocation import candidate_ranks, check_keep
from flrc_edge.baselines.asvd import ALPHA
from flrc_edge.baselines.sensitivity_store import SensitivityStore, Truncation
from flrc_edge.errors import UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.factorization import Factors
from flrc_edge.models import LoadedModel
from flrc_edge.placement import compressed
from flrc_edge.progress import Progress, silent
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Storage, factor_parameters

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # as published; what no truncation names stays dense


@dataclass(frozen=True)
class Search:
    """How the search measures perplexity.

    Published are 32 samples of 2048 tokens. The defaults are 1/32 of these tokens, in as many samples as the default
    calibration mixture needs: there are more than a thousand evaluations, here on a CPU.

    Args:
        samples: Calibration windows each perplexity is measured on.
        window: Tokens of a sample; the model's context if that is shorter.
        alpha: Power of the channel means in the factors.
    """

    samples: int = 4
    window: int = 512
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"the search's {name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.alpha < inf:
            raise UsageError(f"alpha must be 0 or more, not {self.alpha:g}")


def truncation_ranks(
    shape: tuple[int, int],
    *,
    step: int,
    storage: Storage = "plain",
    ratios: Sequence[float] = RATIOS,
) -> tuple[int, ...]:
    """Return, rising, the ranks whose parameters come nearest to each ratio of ``m n``.

    Args:
        shape: ``(m, n)``.
        step: Ranks are multiples of it. Several ratios of a small projection may share a rank.
        storage: How the factors are stored.
        ratios: Shares of the projection's parameters, in (0, 1).
    """
    candidates = candidate_ranks(shape, step, storage=storage)
    if not candidates:
        return ()
    sizes = np.array([factor_parameters(shape, rank, storage=storage) for rank in candidates])
    nearest = (int(np.abs(sizes - ratio * shape[0] * shape[1]).argmin()) for ratio in ratios)
    return tuple(candidates[i] for i in sorted(set(nearest)))


def check_reachable(
    shapes: Mapping[str, tuple[int, int]], keeps: Sequence[float], *, step: int, storage: Storage = "plain"
) -> None:
    """Check, before hours of measuring, that the search can meet every keep.

    Raises:
        UsageError: A keep is below what all truncations together leave.
    """
    everything = [
        Truncation(name, rank, perplexity=1.0)
        for name, shape in shapes.items()
        for rank in truncation_ranks(shape, step=step, storage=storage)
    ]
    for keep in keeps:
        search_ranks(shapes, everything, keep, step=step, storage=storage)


def sensitivities(
    loaded: LoadedModel,
    factors: Mapping[str, Factors],
    ids: Tensor,
    *,
    step: int,
    storage: Storage = "plain",
    ratios: Sequence[float] = RATIOS,
    store: SensitivityStore | None = None,
    progress: Progress = silent,
) -> list[Truncation]:
    """Measure the perplexity of every single truncation; a whole evaluation each.

    Args:
        loaded: The model; as it was afterwards.
        factors: Of every projection.
        ids: ``[windows, length]``: the calibration samples that perplexity is measured on.
        step: Ranks are multiples of it.
        storage: How the factors are stored.
        ratios: Shares of a projection's parameters.
        store: Holds what an earlier run measured, and takes what this one does.
        progress: Called after each evaluation.

    Raises:
        NumericalError: A perplexity is not finite.
    """
    store = store or SensitivityStore(None)
    work = {
        p.name: (p.shape, truncation_ranks(p.shape, step=step, storage=storage, ratios=ratios))
        for p in loaded.config.projections()
    }
    total = sum(len(ranks) for _, ranks in work.values())
    found: list[Truncation] = []
    for name, (shape, ranks) in work.items():
        new = []
        for rank in ranks:
            truncation = store.get(name, rank)
            if truncation is None:
                start = time.perf_counter()
                alone = RankPlan("asvd", (1.0,), (ProjectionPlan(name, shape, (rank,), storage),))
                with compressed(loaded, alone, factors) as model:
                    value = perplexity(torch_logits(model), ids)
                truncation = Truncation(name, rank, value, time.perf_counter() - start)
                new.append(truncation)
            found.append(truncation)
            progress("asvd search", len(found), total)
        store.put(new)
    return found


def search_ranks(
    shapes: Mapping[str, tuple[int, int]],
    truncations: Sequence[Truncation],
    keep: float,
    *,
    step: int,
    storage: Storage = "plain",
) -> RankPlan:
    """Choose the perplexity threshold, and so the ranks, that meet the budget.

    Of each projection the smallest rank whose perplexity is at or below the threshold is taken; with none it stays
    dense. The last truncation frees more than is needed: the rest is given back in rank steps, the most sensitive
    truncated projection first, so that the plan holds as many parameters as those of other allocators.

    Args:
        shapes: ``(m, n)`` by projection.
        truncations: What :func:`sensitivities` measured.
        keep: Share of projection parameters to keep.
        step: Ranks are multiples of it.
        storage: How the factors are stored.

    Raises:
        UsageError: The keep is out of range, or all truncations together leave more.
    """
    check_keep((keep,))
    order = sorted(truncations, key=lambda t: -t.perplexity)
    total = sum(m * n for m, n in shapes.values())
    budget = floor(keep * total + 1e-6)

    def ranks_at(first: int) -> dict[str, int | None]:
        ranks: dict[str, int | None] = dict.fromkeys(shapes)
        for t in order[first:]:
            held = ranks[t.name]
            ranks[t.name] = t.rank if held is None else min(held, t.rank)
        return ranks

    def cost(name: str, rank: int | None) -> int:
        m, n = shapes[name]
        return m * n if rank is None else factor_parameters((m, n), rank, storage=storage)

    def size(ranks: Mapping[str, int | None]) -> int:
        return sum(cost(name, rank) for name, rank in ranks.items())

    # The more truncations are left out, the larger the plan: size is sorted by the index of the first one applied.
    first = bisect_right(range(len(order) + 1), budget, key=lambda i: size(ranks_at(i))) - 1
    if first < 0:
        raise UsageError(
            f"keep {keep:g} is below {size(ranks_at(0)) / total:.3f}, the least that ASVD's truncations leave",
            hint="ask for a larger keep or leave the recipe out",
        )
    ranks = ranks_at(first)
    for t in order[first:]:  # the most sensitive first
        rest = budget - size(ranks) + cost(t.name, ranks[t.name])
        candidates = candidate_ranks(shapes[t.name], step, storage=storage)
        ranks[t.name] = max(rank for rank in candidates if cost(t.name, rank) <= rest)
    projections = tuple(
        ProjectionPlan(name, shapes[name], (rank,), "plain" if rank is None else storage)
        for name, rank in ranks.items()
    )
    return RankPlan("asvd", (float(keep),), projections)
