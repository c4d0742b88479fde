"""Greedy answers of a torch model whose stage may change from token to token, on one KV cache.

Under a schedule, a fixed stage, or any function of the token's index; the dense model is the case without stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_edge.lowrank import set_stage
from flrc_edge.model_cache import cache_argument, cache_of
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import has_template, leading_bos

BATCH = 8  # prompts decoded at once: a step reads the weights once for all

# Index of an answer token (0-based) -> the stage that computes it. Stage ``stage_at(0)`` also reads the prompt.
# ``Schedule.stage_at`` is one.
StageAt = Callable[[int], int]


@dataclass(frozen=True)
class Answer:
    """A prompt and an answer to it, token ids ``[1, P]`` and ``[1, N]``; an end token is part of the answer."""

    prompt: Tensor
    answer: Tensor

    @property
    def length(self) -> int:
        """Tokens N of the answer."""
        return self.answer.shape[1]


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Return the ids ``[1, P]`` of a prompt, through the chat template if the tokenizer has one."""
    if has_template(tokenizer):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        body = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*leading_bos(tokenizer), *body]
    return torch.tensor([ids])


def end_tokens(model: Any) -> tuple[int, ...]:
    """Return the ids that end an answer, of the configuration and of the generation settings."""
    ends: set[int] = set()
    for settings in (model.config, getattr(model, "generation_config", None)):
        found = getattr(settings, "eos_token_id", None)
        ends |= {found} if isinstance(found, int) else set(found or ())
    return tuple(sorted(ends))


def stage_zero(token: int) -> int:
    """Return stage 0 for every token."""
    return 0


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Tensor], stage_at: StageAt = stage_zero, *, most: int
) -> list[Tensor]:
    """Answer a batch of prompts greedily.

    Args:
        model: The dense or compressed model; left at stage 0.
        prompts: Token ids ``[1, P]`` of each; shorter ones are padded on the left.
        stage_at: The stage of every answer token.
        most: Answer tokens at most. Prompt and answer must fit into the model's context.

    Returns:
        Token ids ``[1, N]`` of each answer, its end token included.

    Raises:
        NumericalError: A logit is not finite.
    """
    width, end = max(p.shape[1] for p in prompts), torch.tensor(end_tokens(model))
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])  # (B, P)
    mask = torch.stack([torch.arange(width) >= width - p.shape[1] for p in prompts]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    answer, ended = (
        torch.empty(len(prompts), 0, dtype=torch.long),
        torch.zeros(len(prompts), dtype=torch.bool),
    )
    cache = None
    try:
        for t in range(most):
            set_stage(model, stage_at(t))
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(model, cache),
            )
            if not torch.isfinite(out.logits).all():
                raise NumericalError(
                    f"stage {stage_at(t)} gives values that are not finite at answer token {t}"
                )
            ids, cache = out.logits[:, -1].argmax(-1)[:, None], cache_of(out)
            answer, ended = torch.cat([answer, ids], dim=1), ended | torch.isin(ids[:, 0], end)
            if ended.all():
                break
            mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
    finally:
        set_stage(model, 0)
    lengths = [_length(row, end) for row in answer]
    return [row[None, :n] for row, n in zip(answer, lengths, strict=True)]


def answers(
    model: Any,
    prompts: Sequence[Tensor],
    stage_at: StageAt = stage_zero,
    *,
    most: int,
    progress: Progress = silent,
) -> list[Answer]:
    """Answer any number of prompts greedily, in batches; arguments and errors as in :func:`greedy`.

    Returns:
        The answers in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].shape[1])  # so that padding is short
    result: dict[int, Answer] = {}
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        found = greedy(model, [prompts[i] for i in batch], stage_at, most=most)
        result |= {i: Answer(prompts[i], ids) for i, ids in zip(batch, found, strict=True)}
        progress("answers", len(result), len(prompts))
    return [result[i] for i in range(len(prompts))]


def answer_text(tokenizer: Any, answer: Answer) -> str:
    """Return the text of an answer without special tokens."""
    text: str = tokenizer.decode(answer.answer[0].tolist(), skip_special_tokens=True)
    return text


@torch.no_grad()
def read_prompt(model: Any, answer: Answer, stage: int = 0) -> tuple[Tensor, Any]:
    """Return the log-probabilities ``[1, vocab]`` of the first answer token and the cache of the prompt."""
    set_stage(model, stage)
    out = model(input_ids=answer.prompt, use_cache=True, logits_to_keep=1)
    set_stage(model, 0)
    return out.logits[0].float().log_softmax(-1), cache_of(out)


@torch.no_grad()
def answer_log_probs(
    model: Any, answer: Answer, stage_at: StageAt = stage_zero, *, prompt: tuple[Tensor, Any] | None = None
) -> Tensor:
    """Return the log-probabilities ``[N, vocab]`` of an answer's tokens, on the cache that the stages produce.

    Args:
        model: The dense or compressed model; left at stage 0.
        answer: Teacher-forced: every token is computed after the answer's own tokens.
        stage_at: The stage of every answer token.
        prompt: What :func:`read_prompt` gave with stage ``stage_at(0)``, to save another reading; not changed.
    """
    first, cache = read_prompt(model, answer, stage_at(0)) if prompt is None else deepcopy(prompt)
    result = [first]
    for stage, run in groupby(range(1, answer.length), key=stage_at):
        tokens = list(run)
        set_stage(model, stage)
        # Token t is computed from the one before it.
        inputs = answer.answer[:, tokens[0] - 1 : tokens[-1]]
        out = model(input_ids=inputs, use_cache=True, **cache_argument(model, cache))
        cache = cache_of(out)
        result.append(out.logits[0].float().log_softmax(-1))
    set_stage(model, 0)
    return torch.cat(result)


def _length(ids: Tensor, end: Tensor) -> int:
    """Return the tokens of ``ids`` up to and with the first end token."""
    ends = torch.isin(ids, end).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(ids)
