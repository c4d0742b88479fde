"""All of it: a checkpoint, bundle or model on texts and summaries, with intervals, as one result."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.bertscore import BertScore
from flrc_edge.evaluation.bootstrap import RESAMPLES, Bootstrap
from flrc_edge.evaluation.policies import parse_policies
from flrc_edge.evaluation.policy_runs import read_prompts
from flrc_edge.evaluation.rouge import Rouge
from flrc_edge.evaluation.subject import Subject, check_dense
from flrc_edge.evaluation.summarization import SummaryResult, score_summaries, summary_result
from flrc_edge.evaluation.summary_file import Split
from flrc_edge.evaluation.text import TextResult, score_text, text_result
from flrc_edge.evaluation.windows import text_windows
from flrc_edge.progress import Progress, silent

TEXTS = ("wikitext2-heldout", "austen-heldout")


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what.

    Args:
        texts: Built-in samples, files or folders; none are possible.
        windows: Of each text, from its beginning; None for all.
        window: Tokens of each; the model's context if that is shorter.
        stride: Tokens from one window's start to the next; None for no overlap.
        summaries: Files to summarize.
        samples: Of each file.
        max_tokens: Of an answer.
        split: ``test``, ``validation`` or ``all``.
        policies: Names of policies; none for the default ones. Texts are read by every stage that a ``static``
            policy names, by all stages if none does.
        bertscore: Folder of an encoder, or None.
        resamples: Of the intervals.
        seed: Of the intervals.
    """

    texts: tuple[str, ...] = TEXTS
    windows: int | None = 16
    window: int = 1024
    stride: int | None = None
    summaries: tuple[str, ...] = ()
    samples: int = 50
    max_tokens: int = 128
    split: Split = "test"
    policies: tuple[str, ...] = ()
    bertscore: str | None = None
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.texts and not self.summaries:
            raise UsageError("there is nothing to measure", hint="name a text or a file to summarize")
        if self.window < 2:
            raise UsageError(f"a window must hold at least 2 tokens, not {self.window}")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UsageError(
                f"the stride must lie between 1 and the window of {self.window}, not {self.stride}"
            )
        Bootstrap(1, resamples=self.resamples, seed=self.seed)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and its conditions; ``kept`` is the share of parameters each stage activates."""

    model: str
    kind: str
    dtype: str
    projection_parameters: int
    kept: tuple[float, ...]
    boundaries: tuple[int, ...]
    dense: str | None
    texts: tuple[TextResult, ...]
    summaries: tuple[SummaryResult, ...]
    resamples: int
    seed: int
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, numbers rounded to six digits."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def evaluate(
    subject: Subject, settings: Settings, *, dense: Subject | None = None, progress: Progress = silent
) -> Evaluation:
    """Measure a subject.

    Everything that can be refused is refused before the first token is computed.

    Args:
        subject: From :func:`flrc_edge.evaluation.subject.open_subject`.
        settings: What to measure.
        dense: The dense model, for divergence and for answers to compare with.
        progress: Called after each unit of work.

    Raises:
        UsageError: A text, file, policy or number is not possible, or ``dense`` is of another model.
        NumericalError: A loss or logits are not finite.
    """
    facts = subject.facts
    context = facts.context_length
    if dense is not None:
        check_dense(subject, dense)
        context = min(context, dense.facts.context_length)
    policies = parse_policies(settings.policies, facts.schedule, dense=dense is not None)
    named = sorted({p.stages[-1] for p in policies if p.name.startswith("static:")})
    stages = named or range(len(facts.kept))
    length = min(settings.window, context)
    windows = [
        text_windows(
            subject.tokenizer,
            name,
            windows=settings.windows,
            length=length,
            stride=settings.stride,
            vocab_size=facts.vocab_size,
        )
        for name in settings.texts
    ]
    files = [
        read_prompts(
            subject,
            path,
            split=settings.split,
            count=settings.samples,
            max_tokens=settings.max_tokens,
            context=context,
        )
        for path in settings.summaries
    ]
    if files:
        Rouge()
    encoder = None if settings.bertscore is None else BertScore(settings.bertscore)
    texts = [score_text(subject, w, stages=stages, dense=dense, progress=progress) for w in windows]
    summaries = [
        score_summaries(
            subject, f, dense=dense, policies=settings.policies, bertscore=encoder, progress=progress
        )
        for f in files
    ]
    drawn = {"resamples": settings.resamples, "seed": settings.seed}
    return Evaluation(
        model=facts.name,
        kind=facts.kind,
        dtype=facts.dtype,
        projection_parameters=facts.projection_parameters,
        kept=facts.kept,
        boundaries=facts.schedule.boundaries,
        dense=None if dense is None else f"{dense.facts.name} ({dense.facts.kind}, {dense.facts.dtype})",
        texts=tuple(text_result(t, **drawn) for t in texts),
        summaries=tuple(summary_result(s, **drawn) for s in summaries),
        resamples=settings.resamples,
        seed=settings.seed,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, {_engine(facts.kind)}",
    )


def _engine(kind: str) -> str:
    if kind != "bundle":
        return f"torch {torch.__version__}"
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
