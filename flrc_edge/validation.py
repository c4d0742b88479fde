"""Does a schedule pay? Its divergence on its own KV cache, beside a constant stage of the same cost and its reverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flrc_edge.decoding import Answer, StageAt, read_prompt
from flrc_edge.divergence import constantly, token_divergence
from flrc_edge.progress import Progress, silent
from flrc_runtime.manifest import Schedule


@dataclass(frozen=True)
class Measured:
    """Mean KL(dense || ours) in nats over the tokens of the answers, and mean activated share of decode steps."""

    kl: float
    share: float


@dataclass(frozen=True)
class Validation:
    """A schedule and its controls, teacher-forced on answers it was not chosen on; all read the prompt on stage 0.

    Attributes:
        schedule: The chosen schedule.
        constant: One constant stage of the same mean share. Between two stages its KL is interpolated, log KL
            linear in the share. KL is close to a power of what is left out, so this flatters the constant stage.
        reversed: Every answer's stages backwards.
        gain: ``constant.kl - schedule.kl`` in nats.
        gain_error: Its standard error over the answers; 0 if there is one answer.
        answers: Answers measured.
        tokens: Their tokens.
    """

    schedule: Measured
    constant: Measured
    reversed: Measured
    gain: float
    gain_error: float
    answers: int
    tokens: int

    @property
    def pays(self) -> bool:
        """Whether the schedule diverges less than the constant stage."""
        return self.gain > 0


def validate(
    model: Any,
    reference: Sequence[Answer],
    dense: Sequence[Tensor],
    *,
    schedule: Schedule,
    kept: Sequence[float],
    progress: Progress = silent,
) -> Validation:
    """Measure a schedule beside the constant stage of its mean share and beside its reverse.

    Args:
        model: The compressed model.
        reference: The dense model's answers, at least one of two tokens.
        dense: Its log-probabilities ``[N, vocab]`` of each answer.
        schedule: What to validate.
        kept: Share of activated parameters of each stage, not growing.
        progress: Called after every answer.

    Raises:
        NumericalError: A divergence is not finite.
    """
    decoded = [kept[schedule.stage_at(t)] for a in reference for t in range(1, a.length)]
    share = sum(decoded) / len(decoded)
    larger, smaller, weight = neighbours(kept, share)
    ours, controls, backwards = [], [], []
    for done, (answer, expected) in enumerate(zip(reference, dense, strict=True), 1):
        prompt = read_prompt(model, answer)

        def kl(stage_at: StageAt, a: Answer = answer, d: Tensor = expected, p: Any = prompt) -> float:
            return float(token_divergence(model, a, d, stage_at, prompt=p).sum())

        script = [0, *reversed([schedule.stage_at(t) for t in range(1, answer.length)])]
        ours.append(kl(schedule.stage_at))
        backwards.append(kl(script.__getitem__))
        high = kl(constantly(larger))
        low = high if smaller == larger else kl(constantly(smaller))
        controls.append(max(high, 0.0) ** weight * max(low, 0.0) ** (1 - weight))
        progress("schedule", done, len(reference))
    count, tokens = len(reference), sum(a.length for a in reference)
    gains = torch.tensor(controls, dtype=torch.float64) - torch.tensor(ours, dtype=torch.float64)
    return Validation(
        schedule=Measured(sum(ours) / tokens, share),
        constant=Measured(sum(controls) / tokens, share),
        reversed=Measured(sum(backwards) / tokens, share),
        gain=float(gains.sum()) / tokens,
        gain_error=float(gains.std()) * count**0.5 / tokens if count > 1 else 0.0,
        answers=count,
        tokens=tokens,
    )


def neighbours(kept: Sequence[float], share: float) -> tuple[int, int, float]:
    """Return the stages next above and next below a share, and the weight of the former that gives the share."""
    above = max((s for s, k in enumerate(kept) if k >= share - 1e-9), default=0)
    below = min((s for s, k in enumerate(kept) if k <= share + 1e-9), default=len(kept) - 1)
    gap = kept[above] - kept[below]
    return above, below, (share - kept[below]) / gap if gap > 0 else 1.0
