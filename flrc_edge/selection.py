"""The allocator ``search``: several rank plans, the one whose whole model is closest to the original wins.

Loss curves see one projection at a time. What all of them together cost is measured: mean KL(original || compressed)
on windows that were held out of the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flrc_edge import allocation
from flrc_edge.allocation import Curve
from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors
from flrc_edge.lowrank import set_stage
from flrc_edge.progress import Progress, silent
from flrc_runtime.manifest import RankPlan, Storage

FLOOR = 0.5  # of the uniform plan's rank, for candidates that may not starve a projection
SHARES = (0.1, 0.3)  # of the uniform allocator's curves, in candidates that mix them in
HEAD_CHUNK = 256  # tokens whose logits exist at a time


def candidates(
    shapes: Mapping[str, tuple[int, int]],
    factors: Mapping[str, Factors],
    keep: Sequence[float],
    *,
    step: int,
    storage: Storage,
    scores: Mapping[str, float],
) -> dict[str, RankPlan]:
    """Return rank plans by the name of their rule.

    Args:
        shapes: ``(m, n)`` by name.
        factors: With measured losses.
        keep: Of the stages.
        step: Ranks are multiples of it.
        storage: How factors are stored.
        scores: Recorded in the plans.
    """
    measured = allocation.measured_curves(factors, step=step, storage=storage)
    uniform = allocation.uniform_curves(shapes, step=step, storage=storage)

    def plan(curves: Sequence[Curve]) -> RankPlan:
        return allocation.allocate(curves, keep, allocator="search", scores=scores)

    even = plan(uniform).by_name()
    found = {
        "measured": plan(measured),
        "spectrum": plan(allocation.spectrum_curves(factors, step=step, storage=storage)),
        f"measured, at least {FLOOR:g} of the uniform rank": plan(
            [_floored(c, even[c.name].ranks[-1]) for c in measured]
        ),
    }
    for share in SHARES:
        found[f"measured with {share:.0%} uniform"] = plan(mixed(measured, uniform, share=share))
    return found


def mixed(curves: Sequence[Curve], other: Sequence[Curve], *, share: float) -> list[Curve]:
    """Return ``(1 - share) curves + share other``, the other scaled to the same sum at the middle ranks."""
    own_sum, other_sum = (sum(c.losses[len(c.losses) // 2] for c in part) for part in (curves, other))
    scale = own_sum / other_sum if other_sum > 0 else 0.0
    return [
        replace(
            a,
            losses=tuple(
                (1 - share) * x + share * scale * y for x, y in zip(a.losses, b.losses, strict=True)
            ),
        )
        for a, b in zip(curves, other, strict=True)
    ]


def _floored(curve: Curve, uniform: int | None) -> Curve:
    least = FLOOR * (min(curve.shape) if uniform is None else uniform)
    first = next((i for i, rank in enumerate(curve.ranks) if rank >= least), 0)
    return replace(curve, ranks=curve.ranks[first:], losses=curve.losses[first:])


@torch.no_grad()
def select(
    model: Any,
    plans: Mapping[str, RankPlan],
    ids: Tensor,
    compressed: Callable[[RankPlan], AbstractContextManager[Any]],
    *,
    progress: Progress = silent,
) -> RankPlan:
    """Return the plan with the smallest mean KL over its stages, with all candidates' KL recorded in it.

    Args:
        model: The original model.
        plans: Candidates by name.
        ids: ``[windows, T]`` tokens that nothing was calibrated on.
        compressed: Puts a plan's layers into the model while its block runs.
        progress: Called after every candidate.

    Raises:
        NumericalError: A divergence is not finite.
    """
    references = [model.model(input_ids=w[None], use_cache=False).last_hidden_state[0] for w in ids]
    found: dict[str, float] = {}
    measured: list[tuple[RankPlan, float]] = []
    for done, (name, plan) in enumerate(plans.items(), 1):
        same = [kl for other, kl in measured if other.projections == plan.projections]
        if same:
            found[name] = same[0]
        else:
            with compressed(plan) as changed:
                values = []
                for stage in range(plan.num_stages):
                    set_stage(changed, stage)
                    values += [
                        _divergence(changed, window, reference)
                        for window, reference in zip(ids, references, strict=True)
                    ]
            found[name] = sum(values) / len(values)
            if not torch.isfinite(torch.tensor(found[name])):
                raise NumericalError(f"the rank plan {name!r} gives values that are not finite")
            measured.append((plan, found[name]))
        progress("select", done, len(plans))
    best = min(found, key=lambda name: found[name])
    return replace(plans[best], candidates=found)


def _divergence(model: Any, window: Tensor, reference: Tensor) -> float:
    """Return the mean KL (nats) of one window against the original's last hidden states."""
    hidden = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
    total = 0.0
    for start in range(0, len(window), HEAD_CHUNK):
        stop = start + HEAD_CHUNK
        dense = model.lm_head(reference[start:stop]).float().log_softmax(-1)
        own = model.lm_head(hidden[start:stop]).float().log_softmax(-1)
        total += (dense.exp() * (dense - own)).sum().item()
    return total / len(window)
