"""Where decoding moves on: boundaries of least divergence under a budget on activated parameters.

Weighs positions by how often answers reach them and hands the choice to constrained_path. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flrc_edge.constrained_path import solve
from flrc_edge.errors import UsageError
from flrc_runtime.manifest import Schedule

HORIZON = 96  # answer tokens a schedule is chosen for
BLOCK = 8  # answer tokens that share one measured divergence
SNAP = 0.01  # shares closer than this count as one: ranks come in steps
MOST_SEGMENTS = 64


def default_budget(kept: Sequence[float]) -> float:
    """Return the mean of the stages' shares, or the share of a stage if one lies within ``SNAP`` of it.

    With the latter that stage throughout is among the schedules, so the one chosen is never predicted to be worse.
    """
    mean = sum(kept) / len(kept)
    nearest = min(kept, key=lambda k: abs(k - mean))
    return nearest if abs(nearest - mean) <= SNAP else mean


def constant(stage: int, stages: int, *, end: int) -> Schedule:
    """Return the schedule that reads the prompt on stage 0 and then stays on ``stage``.

    Args:
        stage: Of every token but the first.
        stages: Number of stages.
        end: Token count at which the stages after ``stage`` would begin; one that no answer reaches.
    """
    return Schedule((1,) * stage + (end,) * (stages - 1 - stage))


def used_stages(schedule: Schedule, *, longest: int) -> tuple[int, ...]:
    """Return the stages that compute a token of some answer of at most ``longest`` tokens; stage 0 reads the prompt."""
    return tuple(sorted({schedule.stage_at(t) for t in range(max(longest, 1))}))


def is_constant(schedule: Schedule, *, longest: int) -> bool:
    """Return whether one stage computes every decode step of answers of at most ``longest`` tokens."""
    return schedule.stage_at(1) == schedule.stage_at(max(longest - 1, 1))


def choose(
    kl: Sequence[Sequence[float]],
    kept: Sequence[float],
    *,
    lengths: Sequence[int] | None = None,
    horizon: int = HORIZON,
    block: int = BLOCK,
    mean_keep: float | None = None,
    move_cost: float = 0.0,
    first: int | None = None,
    end: int | None = None,
) -> Schedule:
    """Choose the boundaries of least summed divergence whose mean activated share is within the budget.

    Args:
        kl: ``[stages][blocks]``: mean KL(dense || stage) in nats of a token in that block.
        kept: Share of activated parameters of each stage, not growing.
        lengths: Tokens of each answer. A position counts as often as answers reach it, in divergence and in spend.
            None: every answer fills the horizon.
        horizon: Answer positions covered.
        block: Tokens a column of ``kl``. Boundaries are 1 or multiples of it (of a power of two times it, if there
            were more than 64 of them).
        mean_keep: Largest mean share over decode steps; by default :func:`default_budget`. The first token of an
            answer comes with its prompt, from stage 0, and is no decode step. If no schedule is within the budget,
            the cheapest is taken.
        move_cost: What one move takes out of the budget, in decode steps of the dense model: 0.055 if a move takes
            0.5 ms and a dense token 9 ms.
        first: The latest stage that may compute the first decode step, if the budget allows; None: any.
        end: Boundary of a stage that is never reached, at least ``horizon`` (the default). Longer answers stay on
            the last stage that was chosen up to there.

    Returns:
        The schedule. Stages that do not pay are skipped (two equal boundaries) or never reached.

    Raises:
        UsageError: ``kept`` grows, ``kl`` does not cover the horizon, or ``end`` lies inside it.
    """
    stages, rows = len(kept), tuple(tuple(r) for r in kl)
    end = horizon if end is None else end
    if list(kept) != sorted(kept, reverse=True):
        raise UsageError(f"the shares of the stages must not grow: {', '.join(f'{k:.3f}' for k in kept)}")
    if len(rows) != stages or any(len(r) * block < horizon for r in rows):
        raise UsageError(f"{stages} stages need {stages} rows of at least {-(-horizon // block)} divergences")
    if end < horizon:
        raise UsageError(f"end {end} lies inside the horizon of {horizon} tokens")
    given = [horizon] if lengths is None else [min(n, horizon) for n in lengths]
    longest = max(given, default=0)
    if stages == 1 or longest < 2:
        return Schedule((end,) * (stages - 1), horizon, rows, block)
    step = block
    while longest // step > MOST_SEGMENTS:
        step *= 2
    starts = np.array(sorted({1, *range(step, longest, step)}))
    reaching = np.array([sum(n > t for n in given) for t in range(longest)], dtype=np.float64)
    divergence = np.array(rows, dtype=np.float64)[:, np.arange(longest) // block] * reaching
    tokens = np.add.reduceat(reaching, starts)
    loss = np.add.reduceat(divergence, starts, axis=1).T  # (segments, stages)
    if first is not None:
        loss[0, first + 1 :] += 1 + np.abs(divergence).sum()  # more than any other schedule can lose
    begins = solve(
        loss,
        np.outer(tokens, np.array(kept, dtype=np.float64)),
        move_cost * reaching[starts],
        budget=(default_budget(kept) if mean_keep is None else mean_keep) * float(tokens.sum()),
    )
    return Schedule(tuple([*starts.tolist(), end][i] for i in begins), horizon, rows, block)
