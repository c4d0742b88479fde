"""Progressive decoding: at which token counts decoding moves to a smaller stage, and whether that pays.

Boundaries are chosen on half of the dense model's answers and validated on the other half, on the KV cache that the
schedule itself produces, against a constant stage of the same mean activated share. If they do not beat it, the
constant stage becomes the schedule.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flrc_edge.boundaries import (
    BLOCK,
    HORIZON,
    SNAP,
    choose,
    constant,
    default_budget,
    is_constant,
    used_stages,
)
from flrc_edge.decoding import Answer, answers, prompt_ids
from flrc_edge.divergence import divergence
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import DATA, check_ids
from flrc_edge.validation import Validation, validate
from flrc_runtime.manifest import Schedule


@dataclass(frozen=True)
class PlannedSchedule:
    """What decoding should do.

    Attributes:
        schedule: The schedule to use.
        chosen: The one that was validated: the best that falls, even if a constant stage is predicted to be better.
        validation: None if there was nothing to measure.
        used: Stages the schedule uses in answers of up to the horizon. The others cost a graph and serve nothing.
    """

    schedule: Schedule
    chosen: Schedule
    validation: Validation | None
    used: tuple[int, ...]


def built_in_prompts() -> list[str]:
    """Return the short questions and texts to summarize that ship with the package."""
    prompts: list[str] = json.loads((DATA / "prompts.json").read_text("utf-8"))
    return prompts


def reference_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    *,
    context: int,
    horizon: int = HORIZON,
    progress: Progress = silent,
) -> list[Answer]:
    """Let the dense model answer the prompts greedily, at most ``horizon`` tokens each.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        prompts: The built-in ones by default.
        context: Positions the model has; a prompt that leaves less than ``horizon`` of them is left out.
        horizon: Answer tokens.
        progress: Called after each batch.

    Raises:
        UsageError: A prompt holds a token that the model has no embedding of.
    """
    ids = [prompt_ids(tokenizer, p) for p in (built_in_prompts() if prompts is None else prompts)]
    for one in ids:
        check_ids(one, tokenizer, int(model.config.vocab_size), where="a prompt of the schedule")
    fitting = [p for p in ids if p.shape[1] + horizon <= context]
    return answers(model, fitting, most=horizon, progress=progress)


def plan_schedule(
    model: Any,
    reference: Sequence[Answer],
    dense: Sequence[Tensor],
    *,
    kept: Sequence[float],
    mean_keep: float | None = None,
    move_cost: float = 0.0,
    horizon: int = HORIZON,
    block: int = BLOCK,
    end: int | None = None,
    progress: Progress = silent,
) -> PlannedSchedule:
    """Choose a schedule on every other answer, and validate it on the rest.

    Args:
        model: The compressed model.
        reference: The dense model's answers.
        dense: Its log-probabilities ``[N, vocab]`` of each answer, from ``divergence.dense_log_probs``.
        kept: Share of activated parameters of each stage, not growing.
        mean_keep: Largest mean share over decode steps; ``boundaries.default_budget`` by default.
        move_cost: As in ``boundaries.choose``.
        horizon: Answer positions covered.
        block: Positions that share one measured divergence.
        end: Boundary of stages that are never reached, for instance the context length; not below ``horizon``.
        progress: Called after every answer measured.

    Returns:
        The schedule. It is a constant stage if none of the answers has a decode step, or if the chosen one does not
        beat the constant stage and there is a stage of that share; without one the chosen schedule stays, and the
        validation says what it lost.

    Raises:
        NumericalError: A divergence is not finite.
    """
    stages, end = len(kept), max(horizon, end or 0)
    budget = default_budget(kept) if mean_keep is None else mean_keep
    measured = [i for i, answer in enumerate(reference) if answer.length > 1]
    affordable = next((s for s, k in enumerate(kept) if k <= budget + 1e-9), stages - 1)
    if not measured or stages == 1:
        schedule = constant(affordable, stages, end=end)
        return PlannedSchedule(schedule, schedule, None, used_stages(schedule, longest=horizon))
    chosen_on, validated_on = measured[::2], measured[1::2] or measured
    steps = len(chosen_on) + len(validated_on)
    rows = divergence(
        model,
        [reference[i] for i in chosen_on],
        [dense[i] for i in chosen_on],
        stages=stages,
        horizon=horizon,
        block=block,
        progress=lambda phase, done, _: progress(phase, done, steps),
    )
    lengths = [reference[i].length for i in chosen_on]

    def best(first: int | None) -> Schedule:
        return choose(
            rows,
            kept,
            lengths=lengths,
            horizon=horizon,
            block=block,
            mean_keep=budget,
            move_cost=move_cost,
            first=first,
            end=end,
        )

    chosen = best(None)
    if is_constant(chosen, longest=max(lengths)) and chosen.stage_at(1) > 0:
        # The rows know nothing of what a better cache early in the answer is worth later: let the measurement say.
        chosen = best(chosen.stage_at(1) - 1)
    validation = validate(
        model,
        [reference[i] for i in validated_on],
        [dense[i] for i in validated_on],
        schedule=chosen,
        kept=kept,
        progress=lambda phase, done, _: progress(phase, len(chosen_on) + done, steps),
    )
    schedule = chosen
    if not validation.pays and abs(kept[affordable] - validation.constant.share) <= SNAP:
        schedule = replace(chosen, boundaries=constant(affordable, stages, end=end).boundaries)
    return PlannedSchedule(schedule, chosen, validation, used_stages(schedule, longest=horizon))
