"""Answers under a script of stages: greedy, and the given tokens of another answer (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import groupby

import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_edge.evaluation.subject import ReadPrompt


def greedy(read: ReadPrompt, script: Sequence[int], *, ends: Set[int], most: int) -> list[int]:
    """Answer greedily behind a prompt; an end token is part of the answer.

    Args:
        read: The prompt, read by the script's first stage.
        script: Stage of every answer token; the last one holds on.
        ends: Tokens that end the answer.
        most: Tokens of it.

    Raises:
        NumericalError: Logits are not finite.
    """
    logits, answer = read.logits, list[int]()
    while True:
        if not torch.isfinite(logits).all():
            raise NumericalError(f"the logits of answer token {len(answer)} are not finite")
        answer.append(int(logits.argmax()))
        if len(answer) == most or answer[-1] in ends:
            return answer
        logits = read.feed(answer[-1:], script[min(len(answer), len(script) - 1)])[-1]


def forced(read: ReadPrompt, answer: Sequence[int], script: Sequence[int]) -> Tensor:
    """Return the logits ``[N, vocab]`` that predict each of the N tokens of a given answer.

    The cache is the one this script produces: answer token i - 1 is fed through ``script[i]``.

    Args:
        read: The prompt, read by the script's first stage, and nothing behind it.
        answer: N token ids.
        script: N stages.
    """
    rows = [read.logits[None]]
    for stage, group in groupby(range(1, len(answer)), key=lambda i: script[i]):
        places = list(group)
        rows.append(read.feed(answer[places[0] - 1 : places[-1]], stage))
    return torch.cat(rows)
