"""Perplexity, bits per byte, KL to the dense model and top-1 agreement on the windows of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flrc_edge.evaluation.bootstrap import (
    RESAMPLES,
    Bootstrap,
    Estimate,
    Statistic,
    pooled_mean,
    pooled_quantile,
    ratio,
)
from flrc_edge.evaluation.policies import DENSE
from flrc_edge.evaluation.subject import Subject
from flrc_edge.evaluation.token_scores import TokenScores, log_probs_, token_scores
from flrc_edge.evaluation.windows import TextWindows
from flrc_edge.progress import Progress, silent


@dataclass(frozen=True)
class TextFigures:
    """One stage on one text.

    Attributes:
        stage: ``static:S``, or ``dense``.
        keep: Share of projection parameters it activates.
        estimates: By name. ``perplexity``: ``exp`` of the mean negative log-likelihood; ``bits_per_byte``: the
            same in bits per UTF-8 byte, which compares models of different vocabularies. With a dense model also
            ``kl`` and ``kl_p99``: mean and 99th percentile over tokens of KL(dense || stage) in nats; ``top1``: share
            of tokens whose most likely prediction is the dense model's.
    """

    stage: str
    keep: float
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class TextResult:
    """All stages on one text, and the conditions; ``bytes`` are those of the tokens that count."""

    text: str
    windows: int
    window: int
    stride: int
    bos: bool
    tokens: int
    bytes: int
    figures: tuple[TextFigures, ...]


@dataclass(frozen=True)
class TextScores:
    """What was measured on a text: by stage and figure, a statistic over the windows.

    Statistics of two subjects on the same windows can be compared with :meth:`Bootstrap.difference`.
    """

    text: TextWindows
    keep: Mapping[str, float]
    statistics: Mapping[str, Mapping[str, Statistic]]


def score_text(
    subject: Subject,
    text: TextWindows,
    *,
    stages: Sequence[int],
    dense: Subject | None = None,
    progress: Progress = silent,
) -> TextScores:
    """Measure stages on a text; a window's dense log-probabilities are computed once for all of them.

    Args:
        subject: What is measured.
        text: The windows.
        stages: Which of its stages.
        dense: The dense model; gives a row of its own, and KL and agreement to the others.
        progress: Called after every window.

    Raises:
        NumericalError: A loss or divergence is not finite.
    """
    scores: dict[str, list[TokenScores]] = {}
    for i, (ids, first) in enumerate(zip(text.ids, text.first, strict=True)):
        targets, rows = ids[first:], slice(first - 1, -1)
        where = f"window {i} of {text.name}"
        reference = None
        if dense is not None:
            reference = log_probs_(dense.logits(ids, 0)[rows])
            scores.setdefault(DENSE, []).append(token_scores(reference, targets, where=where))
        for stage in stages:
            log_probs = log_probs_(subject.logits(ids, stage)[rows])
            found = token_scores(log_probs, targets, dense=reference, where=where)
            scores.setdefault(f"static:{stage}", []).append(found)
        progress(f"text {text.name}", i + 1, len(text.first))
    kept = subject.facts.kept
    return TextScores(
        text,
        {DENSE: 1.0, **{f"static:{s}": kept[s] for s in stages}},
        {name: _statistics(found, text.bytes) for name, found in scores.items()},
    )


def text_result(scores: TextScores, *, resamples: int = RESAMPLES, seed: int = 0) -> TextResult:
    """Return the figures of all stages with their intervals over windows."""
    text = scores.text
    bootstrap = Bootstrap(len(text.first), resamples=resamples, seed=seed)
    return TextResult(
        text=text.name,
        windows=len(text.first),
        window=text.ids.shape[1],
        stride=text.stride,
        bos=text.bos,
        tokens=text.tokens,
        bytes=sum(text.bytes),
        figures=tuple(
            TextFigures(name, scores.keep[name], {key: bootstrap.estimate(s) for key, s in found.items()})
            for name, found in scores.statistics.items()
        ),
    )


def _statistics(scores: Sequence[TokenScores], sizes: Sequence[int]) -> dict[str, Statistic]:
    losses = np.array([s.nll.sum() for s in scores])
    counts = [len(s.nll) for s in scores]
    found = {
        "perplexity": ratio(losses, counts, transform=math.exp),
        "bits_per_byte": ratio(losses / math.log(2), sizes),
    }
    kl = [s.kl for s in scores if s.kl is not None]
    top1 = [s.top1 for s in scores if s.top1 is not None]
    if kl:
        found |= {"kl": pooled_mean(kl), "kl_p99": pooled_quantile(kl, 0.99), "top1": pooled_mean(top1)}
    return found
