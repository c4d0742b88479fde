"""Figures of summaries: ROUGE against people and against the dense model, KL to it, repetition, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flrc_edge.evaluation.bertscore import BertScore
from flrc_edge.evaluation.bootstrap import (
    RESAMPLES,
    Bootstrap,
    Estimate,
    Statistic,
    mean,
    pooled_mean,
    pooled_quantile,
    ratio,
)
from flrc_edge.evaluation.policies import DENSE, default_policies, parse_policies
from flrc_edge.evaluation.policy_runs import (
    Prompt,
    PromptSet,
    Tally,
    answer_densely,
    planned_lengths,
    run_policies,
)
from flrc_edge.evaluation.rouge import VARIANTS, Rouge
from flrc_edge.evaluation.subject import Subject
from flrc_edge.progress import Progress, silent

COMPARED = ("rougeL", "rougeL_dense", "kl")  # what is compared with the control, prompt by prompt


@dataclass(frozen=True)
class PolicyFigures:
    """One policy.

    Attributes:
        policy: Its name.
        estimates: By name. ``prompt_keep``, ``answer_keep``: share of projection parameters a token activates;
            ``tokens`` of an answer; ``rouge1 rouge2 rougeL`` against the references; ``repetition``. With a dense
            model also ``rouge1_dense …`` against its answers and, on its answers, ``kl`` and ``kl_p99`` (nats),
            ``top1`` and ``forced_keep``. With an encoder ``bertscore`` and ``bertscore_dense``.
    """

    policy: str
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """``policy - against`` in one figure, paired over prompts."""

    policy: str
    against: str
    figure: str
    estimate: Estimate


@dataclass(frozen=True)
class SummaryResult:
    """All policies on one file, and the conditions; ``too_long`` prompts were passed over."""

    file: str
    data: str
    split: str
    samples: int
    too_long: int
    max_tokens: int
    prompt_tokens: float
    bertscore: str | None
    control: str | None
    policies: tuple[PolicyFigures, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class SummaryScores:
    """What was measured on a set of prompts: by policy and figure, a statistic over the prompts.

    Statistics of two subjects on the same prompts can be compared with :meth:`Bootstrap.difference`.
    """

    prompts: PromptSet
    control: str | None
    bertscore: str | None
    statistics: Mapping[str, Mapping[str, Statistic]]


def score_summaries(
    subject: Subject,
    prompts: PromptSet,
    *,
    dense: Subject | None = None,
    policies: Sequence[str] = (),
    bertscore: BertScore | None = None,
    progress: Progress = silent,
) -> SummaryScores:
    """Summarize under every policy.

    Args:
        subject: What is measured.
        prompts: From :func:`flrc_edge.evaluation.policy_runs.read_prompts`.
        dense: The dense model, or None.
        policies: As :func:`flrc_edge.evaluation.policies.parse_policies` reads them; none for the default ones.
        bertscore: An encoder, or None.
        progress: Called after every prompt.

    Raises:
        UsageError: A policy is not possible.
        NumericalError: Logits are not finite.
    """
    schedule, kept, most = subject.facts.schedule, subject.facts.kept, prompts.max_tokens
    named = parse_policies(policies, schedule, dense=dense is not None)
    rouge = Rouge()
    asked: Sequence[Prompt] = prompts.prompts
    dense_tally: Tally | None = None
    if dense is not None:
        asked, dense_tally = answer_densely(
            subject, asked, dense, max_tokens=most, name=prompts.file, progress=progress
        )
    defaults, control = default_policies(
        schedule, kept, planned=planned_lengths(subject, asked, max_tokens=most)
    )
    tallies = run_policies(
        subject,
        asked,
        named if policies else defaults,
        dense=dense,
        max_tokens=most,
        name=prompts.file,
        progress=progress,
    )
    if dense_tally is not None and (DENSE in policies or not policies):
        tallies = {DENSE: dense_tally, **tallies}
    dense_texts = None if dense_tally is None else dense_tally.text
    return SummaryScores(
        prompts,
        control if control in tallies else None,
        None if bertscore is None else bertscore.name,
        {name: _statistics(t, asked, dense_texts, rouge, bertscore) for name, t in tallies.items()},
    )


def summary_result(scores: SummaryScores, *, resamples: int = RESAMPLES, seed: int = 0) -> SummaryResult:
    """Return the figures of all policies with their intervals over prompts, and the differences to the control."""
    done = scores.prompts
    bootstrap = Bootstrap(len(done.prompts), resamples=resamples, seed=seed)
    return SummaryResult(
        file=done.file,
        data=done.data,
        split=done.split,
        samples=len(done.prompts),
        too_long=done.too_long,
        max_tokens=done.max_tokens,
        prompt_tokens=sum(len(p.ids) for p in done.prompts) / len(done.prompts),
        bertscore=scores.bertscore,
        control=scores.control,
        policies=tuple(
            PolicyFigures(policy, {key: bootstrap.estimate(s) for key, s in found.items()})
            for policy, found in scores.statistics.items()
        ),
        differences=tuple(_differences(scores.statistics, scores.control, bootstrap)),
    )


def _statistics(
    tally: Tally,
    prompts: Sequence[Prompt],
    dense_texts: Sequence[str] | None,
    rouge: Rouge,
    bertscore: BertScore | None,
) -> dict[str, Statistic]:
    sizes = [len(p.ids) for p in prompts]
    found = {
        "prompt_keep": ratio([s * n for s, n in zip(tally.prompt_share, sizes, strict=True)], sizes),
        "answer_keep": ratio([s * n for s, n in zip(tally.share, tally.tokens, strict=True)], tally.tokens),
        "tokens": mean(tally.tokens),
        "repetition": mean(tally.repeated),
    }
    against = {"": [p.sample.reference for p in prompts], "_dense": dense_texts}
    for suffix, references in against.items():
        if references is None:
            continue
        pairs = list(zip(references, tally.text, strict=True))
        scores = [rouge(*pair) for pair in pairs]
        found |= {f"{v}{suffix}": mean([s[i] for s in scores]) for i, v in enumerate(VARIANTS)}
        if bertscore is not None:
            found[f"bertscore{suffix}"] = mean([bertscore(*pair) for pair in pairs])
    if tally.forced:
        kl = [s.kl for s in tally.forced if s.kl is not None]
        top1 = [s.top1 for s in tally.forced if s.top1 is not None]
        lengths = [len(v) for v in kl]
        shares = [s * n for s, n in zip(tally.forced_share, lengths, strict=True)]
        found |= {
            "kl": pooled_mean(kl),
            "kl_p99": pooled_quantile(kl, 0.99),
            "top1": pooled_mean(top1),
            "forced_keep": ratio(shares, lengths),
        }
    return found


def _differences(
    statistics: Mapping[str, Mapping[str, Statistic]], control: str | None, bootstrap: Bootstrap
) -> list[Difference]:
    if control is None:
        return []
    return [
        Difference(policy, control, figure, bootstrap.difference(found[figure], statistics[control][figure]))
        for policy, found in statistics.items()
        if policy not in (control, DENSE)
        for figure in COMPARED
        if figure in found
    ]
