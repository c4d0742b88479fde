"""KL(dense || stages) on the dense model's own answers, by position, stage and schedule.

Teacher-forced: every stage continues the dense model's tokens, on the KV cache that the stages before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flrc_edge.boundaries import BLOCK, HORIZON
from flrc_edge.decoding import Answer, StageAt, answer_log_probs, read_prompt
from flrc_edge.errors import NumericalError
from flrc_edge.progress import Progress, silent


def dense_log_probs(model: Any, reference: Sequence[Answer], *, progress: Progress = silent) -> list[Tensor]:
    """Return the dense model's log-probabilities ``[N, vocab]`` at every token of its answers.

    They take ``4 N vocab`` bytes an answer: 19 MB for 96 tokens and a vocabulary of 49 k.
    """
    result = []
    for answer in reference:
        result.append(answer_log_probs(model, answer))
        progress("dense", len(result), len(reference))
    return result


def token_divergence(
    model: Any,
    answer: Answer,
    dense: Tensor,
    stage_at: StageAt,
    *,
    prompt: tuple[Tensor, Any] | None = None,
) -> Tensor:
    """Return KL(dense || stages) in nats of every token of an answer, ``[N]`` float64.

    Args:
        model: The compressed model.
        answer: The dense model's answer.
        dense: Its log-probabilities ``[N, vocab]``.
        stage_at: The stage of every answer token; ``stage_at(0)`` reads the prompt.
        prompt: What ``read_prompt`` gave, if it was read already.

    Raises:
        NumericalError: A divergence is not finite.
    """
    log_probs = answer_log_probs(model, answer, stage_at, prompt=prompt)
    kl = (dense.exp() * (dense - log_probs)).sum(-1).double()
    if not torch.isfinite(kl).all():
        token = int(torch.isfinite(kl).logical_not().nonzero()[0])
        raise NumericalError(
            f"stage {stage_at(token)} gives values that are not finite at answer token {token}"
        )
    return kl


def schedule_divergence(
    model: Any, reference: Sequence[Answer], dense: Sequence[Tensor], stage_at: StageAt
) -> float:
    """Return the mean KL(dense || stages) in nats over all tokens of the answers, decoded under a schedule.

    Args:
        model: The compressed model.
        reference: The dense model's answers.
        dense: Its log-probabilities ``[N, vocab]`` of each answer, from :func:`dense_log_probs`.
        stage_at: ``Schedule.stage_at``, or any function from a token's index to its stage.
    """
    kl = [token_divergence(model, a, d, stage_at) for a, d in zip(reference, dense, strict=True)]
    return float(torch.cat(kl).mean())


def constantly(stage: int) -> StageAt:
    """Return stage 0 for the prompt, and so for the first token, and ``stage`` for every other token."""
    return lambda t: stage if t else 0


def divergence(
    model: Any,
    reference: Sequence[Answer],
    dense: Sequence[Tensor],
    *,
    stages: int,
    horizon: int = HORIZON,
    block: int = BLOCK,
    progress: Progress = silent,
) -> tuple[tuple[float, ...], ...]:
    """Measure the mean KL(dense || stage) in nats, one row a stage, one column a block of answer positions.

    The prompt is read by stage 0, the whole answer so far by the row's stage.

    Args:
        model: The compressed model.
        reference: The dense model's answers, at least one.
        dense: Its log-probabilities ``[N, vocab]`` of each answer, from :func:`dense_log_probs`.
        stages: Number of stages.
        horizon: Answer positions covered.
        block: Positions a column.
        progress: Called after every answer.

    Raises:
        NumericalError: A divergence is not finite.
    """
    columns = -(-horizon // block)
    total = torch.zeros(stages, columns, dtype=torch.float64)
    count = torch.zeros(columns, dtype=torch.float64)
    for done, (answer, expected) in enumerate(zip(reference, dense, strict=True), 1):
        column = torch.arange(answer.length) // block
        count.index_add_(0, column, torch.ones(answer.length, dtype=torch.float64))
        prompt = read_prompt(model, answer)
        for stage in range(stages):
            kl = token_divergence(model, answer, expected, constantly(stage), prompt=prompt)
            total[stage].index_add_(0, column, kl)
        progress("schedule", done, len(reference))
    # Blocks that no answer reaches take the value of the last one reached.
    reached = int((count > 0).sum())
    mean = total[:, :reached] / count[:reached]
    return tuple(tuple(row + row[-1:] * (columns - reached)) for row in mean.tolist())
