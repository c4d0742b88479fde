"""Run policies on prompts: free greedy answers, and scores on the dense model's own answers.

A prompt is read once a stage; all policies that read it there go on from the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flrc_edge.decoding import prompt_ids
from flrc_edge.errors import UsageError
from flrc_edge.evaluation.answers import forced, greedy
from flrc_edge.evaluation.policies import StagePolicy
from flrc_edge.evaluation.rouge import repetition
from flrc_edge.evaluation.subject import ReadPrompt, Subject
from flrc_edge.evaluation.summary_file import Sample, Split, read_samples
from flrc_edge.evaluation.token_scores import TokenScores, log_probs_, token_scores
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import check_ids


@dataclass(frozen=True)
class Prompt:
    """A sample as token ids, with the dense model's greedy answer where there is a dense model."""

    sample: Sample
    ids: tuple[int, ...]
    dense_answer: tuple[int, ...] | None = None


@dataclass
class Tally:
    """What one policy did, one entry a prompt."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_share: list[float] = field(default_factory=list)  # activated by each prompt token
    share: list[float] = field(default_factory=list)  # mean over the tokens of its own answer
    repeated: list[float] = field(default_factory=list)
    forced_share: list[float] = field(default_factory=list)  # mean over the tokens of the dense answer
    forced: list[TokenScores] = field(default_factory=list)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file that leave room for an answer; ``too_long`` others were passed over."""

    file: str
    data: str
    split: Split
    max_tokens: int
    prompts: tuple[Prompt, ...]
    too_long: int


def read_prompts(
    subject: Subject,
    path: str | Path,
    *,
    split: Split,
    count: int,
    max_tokens: int,
    context: int | None = None,
) -> PromptSet:
    """Read the first prompts of a file that leave room for an answer.

    Args:
        subject: Gives the tokenizer.
        path: The file.
        split: Which part of it.
        count: How many prompts.
        max_tokens: Of an answer.
        context: Most tokens of prompt and answer together; None for the subject's own.

    Raises:
        UsageError: The file or a number is not possible, or no prompt fits the context.
    """
    for name, value in (("samples", count), ("answer tokens", max_tokens)):
        if value < 1:
            raise UsageError(f"the number of {name} must be at least 1, not {value}")
    data, samples = read_samples(path, split=split)
    context = subject.facts.context_length if context is None else context
    prompts, too_long = list[Prompt](), 0
    for sample in samples:
        if len(prompts) == count:
            break
        found = prompt_ids(subject.tokenizer, sample.prompt)
        check_ids(found, subject.tokenizer, subject.facts.vocab_size, where="a prompt")
        ids = found[0].tolist()
        if len(ids) + max_tokens <= context:
            prompts.append(Prompt(sample, tuple(ids)))
        else:
            too_long += 1
    if not prompts:
        raise UsageError(
            f"no prompt of {path} leaves room for {max_tokens} answer tokens in a context of {context}",
            hint="ask for shorter answers with --max-tokens, or give a file of shorter texts",
        )
    return PromptSet(Path(path).name, data, split, max_tokens, tuple(prompts), too_long)


def answer_densely(
    subject: Subject,
    prompts: Sequence[Prompt],
    dense: Subject,
    *,
    max_tokens: int,
    name: str = "summaries",
    progress: Progress = silent,
) -> tuple[list[Prompt], Tally]:
    """Let the dense model answer; return the prompts with its answers, and its tally."""
    answered, tally = [], Tally()
    for i, prompt in enumerate(prompts):
        with dense.read(prompt.ids, 0) as read:
            answer = greedy(read, (0,), ends=dense.facts.ends, most=max_tokens)
        answered.append(Prompt(prompt.sample, prompt.ids, tuple(answer)))
        _record(tally, subject, answer, [1.0] * len(answer))
        progress(f"{name}, dense", i + 1, len(prompts))
    return answered, tally


def planned_lengths(subject: Subject, prompts: Sequence[Prompt], *, max_tokens: int) -> list[int]:
    """Return the length every answer is planned with: the dense model's, else the schedule's horizon."""
    horizon = min(subject.facts.schedule.horizon or max_tokens, max_tokens)
    return [horizon if p.dense_answer is None else len(p.dense_answer) for p in prompts]


def run_policies(
    subject: Subject,
    prompts: Sequence[Prompt],
    policies: Sequence[StagePolicy],
    *,
    dense: Subject | None,
    max_tokens: int,
    name: str = "summaries",
    progress: Progress = silent,
) -> dict[str, Tally]:
    """Answer every prompt under every policy, and score each policy on the dense model's answers.

    Args:
        subject: What is measured.
        prompts: With the dense model's answers if there is one.
        policies: What is compared.
        dense: The dense model, or None.
        max_tokens: Of an answer.
        name: Of the data, for progress.
        progress: Called after every prompt.

    Returns:
        The tallies by policy, in the order of ``policies``.
    """
    tallies = {policy.name: Tally() for policy in policies}
    planned = planned_lengths(subject, prompts, max_tokens=max_tokens)
    for i, (prompt, length) in enumerate(zip(prompts, planned, strict=True)):
        reference = None if dense is None else _dense_log_probs(dense, prompt)
        first = _first_stage(length)
        for stage, group in groupby(sorted(policies, key=first), key=first):
            with subject.read(prompt.ids, stage) as read:
                runs = _Runs(subject, read, max_tokens)
                for policy in group:
                    tally, script = tallies[policy.name], policy.script(max_tokens, planned=length)
                    answer = runs.answer(script)
                    _record(tally, subject, answer, [subject.facts.kept[s] for s in script[: len(answer)]])
                    if reference is not None and prompt.dense_answer is not None:
                        where = f"the dense answer to prompt {i} of {name}"
                        scores = runs.scores(script[:length], prompt.dense_answer, reference, where=where)
                        tally.forced.append(scores)
                        tally.forced_share.append(
                            float(np.mean([subject.facts.kept[s] for s in script[:length]]))
                        )
        progress(name, i + 1, len(prompts))
    return tallies


class _Runs:
    """What was computed behind one prompt; policies that agree as far as an answer goes share it."""

    def __init__(self, subject: Subject, read: ReadPrompt, most: int) -> None:
        self._subject, self._read, self._most = subject, read, most
        self._answers: list[tuple[Sequence[int], list[int]]] = []
        self._scores: dict[tuple[int, ...], TokenScores] = {}

    def answer(self, script: tuple[int, ...]) -> list[int]:
        for other, answer in self._answers:
            if other[: len(answer)] == script[: len(answer)]:
                return answer
        answer = greedy(self._read, script, ends=self._subject.facts.ends, most=self._most)
        self._read.rewind()
        self._answers.append((script, answer))
        return answer

    def scores(
        self, script: tuple[int, ...], answer: Sequence[int], reference: Tensor, *, where: str
    ) -> TokenScores:
        if script not in self._scores:
            log_probs = log_probs_(forced(self._read, answer, script))
            self._read.rewind()
            self._scores[script] = token_scores(log_probs, torch.tensor(answer), dense=reference, where=where)
        return self._scores[script]


def _first_stage(planned: int) -> Callable[[StagePolicy], int]:
    return lambda policy: policy.script(1, planned=planned)[0]


def _dense_log_probs(dense: Subject, prompt: Prompt) -> Tensor | None:
    """Return the dense model's log-probabilities ``[N, vocab]`` of its own answer."""
    if prompt.dense_answer is None:
        return None
    with dense.read(prompt.ids, 0) as read:
        return log_probs_(forced(read, prompt.dense_answer, (0,) * len(prompt.dense_answer)))


def _record(tally: Tally, subject: Subject, answer: Sequence[int], shares: Sequence[float]) -> None:
    ended = answer[-1] in subject.facts.ends
    tally.text.append(subject.tokenizer.decode(answer, skip_special_tokens=True).strip())
    tally.tokens.append(len(answer))
    tally.prompt_share.append(shares[0])
    tally.share.append(float(np.mean(shares)))
    tally.repeated.append(repetition(answer[:-1] if ended else answer))
