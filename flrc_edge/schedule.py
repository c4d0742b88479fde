"""Progressive decoding: at which token counts decoding moves to a smaller stage.

Measured on the dense model's own greedy answers: ``d_s(t) = mean KL(dense || stage s)`` at answer position t, with
the prompt in the cache as stage 0 computed it and the answer so far as stage s did. The boundaries minimise
``Σ_t d_{s(t)}(t)`` with a falling rank, under a budget on the mean share of activated parameters. A simplification:
positions after a move see a cache that stage s filled from the start.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.errors import NumericalError
from flrc_edge.lowrank import set_stage
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import DATA, leading_bos
from flrc_runtime.manifest import Schedule

HORIZON = 96  # answer tokens the schedule is chosen for
BLOCK = 16  # answer tokens that share one measured divergence
MOST_CHOICES = 200_000


@dataclass(frozen=True)
class Answer:
    """A prompt and the dense model's greedy answer to it, token ids ``[1, P]`` and ``[1, N]``."""

    prompt: Tensor
    answer: Tensor


def built_in_prompts() -> list[str]:
    """Return the short questions that ship with the package."""
    prompts: list[str] = json.loads((DATA / "prompts.json").read_text("utf-8"))
    return prompts


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Return the ids ``[1, P]`` of a prompt, through the chat template if the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        body = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*leading_bos(tokenizer), *body]
    return torch.tensor([ids])


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, horizon: int = HORIZON, progress: Progress = silent
) -> list[Answer]:
    """Let the dense model answer greedily, at most ``horizon`` tokens each; empty answers are left out."""
    result = []
    for i, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=horizon,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        if out.shape[1] > ids.shape[1]:
            result.append(Answer(ids, out[:, ids.shape[1] :]))
        progress("answers", i + 1, len(prompts))
    return result


@torch.no_grad()
def divergence(
    model: nn.Module,
    reference: Sequence[Answer],
    references: Sequence[Tensor],
    *,
    stages: int,
    horizon: int = HORIZON,
    block: int = BLOCK,
    progress: Progress = silent,
) -> tuple[tuple[float, ...], ...]:
    """Measure the mean KL(dense || stage) in nats, one row a stage, one column a block of answer positions.

    Args:
        model: The compressed model.
        reference: The dense model's answers.
        references: Its log-probabilities ``[N, vocab]`` of each answer's tokens, from :func:`dense_log_probs`.
        stages: Number of stages.
        horizon: Answer positions covered.
        block: Positions a column.
        progress: Called after every stage.

    Raises:
        NumericalError: A divergence is not finite.
    """
    columns = -(-horizon // block)
    total = torch.zeros(stages, columns, dtype=torch.float64)
    count = torch.zeros(columns, dtype=torch.float64)
    for done, (answer, dense) in enumerate(zip(reference, references, strict=True)):
        positions = torch.arange(answer.answer.shape[1])
        count.index_add_(0, positions // block, torch.ones(len(positions), dtype=torch.float64))
        for stage in range(stages):
            log_probs = _stage_log_probs(model, answer, stage)
            kl = (dense.exp() * (dense - log_probs)).sum(-1).double()  # (N,)
            if not torch.isfinite(kl).all():
                raise NumericalError(f"stage {stage} gives values that are not finite on prompt {done}")
            total[stage].index_add_(0, positions // block, kl)
        progress("schedule", done + 1, len(reference))
    # Blocks that no answer reaches take the value of the last one reached.
    reached = int((count > 0).sum())
    mean = total[:, :reached] / count[:reached]
    return tuple(tuple(row + row[-1:] * (columns - reached)) for row in mean.tolist())


@torch.no_grad()
def dense_log_probs(model: Any, reference: Sequence[Answer]) -> list[Tensor]:
    """Return the dense model's log-probabilities ``[N, vocab]`` at every token of its answers."""
    result = []
    for a in reference:
        logits = model(input_ids=torch.cat([a.prompt, a.answer], dim=1), use_cache=False).logits[0]
        result.append(logits[a.prompt.shape[1] - 1 : -1].float().log_softmax(-1))
    return result


def _stage_log_probs(model: Any, answer: Answer, stage: int) -> Tensor:
    """Return log-probabilities ``[N, vocab]``: the prompt through stage 0, the answer through ``stage``."""
    set_stage(model, 0)
    prompt = model(input_ids=answer.prompt, use_cache=True)
    logits = prompt.logits[0, -1:]
    if answer.answer.shape[1] > 1:
        set_stage(model, stage)
        rest = model(input_ids=answer.answer[:, :-1], past_key_values=prompt.past_key_values, use_cache=True)
        set_stage(model, 0)
        logits = torch.cat([logits, rest.logits[0]])
    log_probs: Tensor = logits.float().log_softmax(-1)
    return log_probs


def choose(
    kl: Sequence[Sequence[float]],
    kept: Sequence[float],
    *,
    horizon: int = HORIZON,
    block: int = BLOCK,
    mean_keep: float | None = None,
) -> Schedule:
    """Choose the boundaries.

    Args:
        kl: ``[stages][blocks]`` from :func:`divergence`.
        kept: Share of activated parameters of each stage, falling.
        horizon: Answer length in tokens.
        block: Tokens a column of ``kl``.
        mean_keep: Largest mean share over the horizon; by default the mean of ``kept``, what equal parts would use.

    Returns:
        The schedule with the smallest summed divergence within the budget.
    """
    stages = len(kept)
    rows = tuple(tuple(r) for r in kl)
    if stages == 1:
        return Schedule((), horizon, rows, block)
    budget = sum(kept) / stages if mean_keep is None else mean_keep
    step = block
    while comb(-(-horizon // step) + stages, stages - 1) > MOST_CHOICES:
        step *= 2
    # 1 is the earliest: the first answer token comes with the prompt, from stage 0.
    grid = sorted({1, *range(step, horizon, step), horizon})
    best: tuple[float, float, tuple[int, ...]] | None = None
    for boundaries in combinations_with_replacement(grid, stages - 1):
        at = [bisect_right(boundaries, t) for t in range(horizon)]
        mean = sum(kept[s] for s in at) / horizon
        loss = sum(kl[s][t // block] for t, s in enumerate(at))
        # Within the budget the smaller divergence, outside it the cheaper.
        key = (max(mean - budget - 1e-9, 0.0), loss, boundaries)
        if best is None or key < best:
            best = key
    assert best is not None
    return Schedule(best[2], horizon, rows, block)
