"""The loss of a window's tokens and its gradient at what the head reads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Labels = Literal["sampled", "text"]
HEAD_CHUNK = 256  # tokens whose logits exist at a time: a vocabulary of 262,144 costs 1 GiB per 1024 tokens


class NotFiniteError(Exception):
    """Raised in the middle of a pass, so that what is named is the first thing that went wrong."""


def loss_gradient(
    model: Any, hidden: Tensor, ids: Tensor, *, labels: Labels, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the loss of one window, summed over its tokens, and its gradient.

    Args:
        model: A Hugging Face causal language model.
        hidden: ``[1, T, h]``, what its head reads.
        ids: ``[T]``; the loss is that of positions 0 to T - 2.
        labels: What the loss predicts: tokens ``sampled`` from the model, or the ``text``'s own.
        seed: Of the sampled labels.

    Returns:
        The summed loss (nats, float64) and ``[1, T, h]``, its gradient with respect to ``hidden``.

    Raises:
        NotFiniteError: The loss is not finite.
    """
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    targets = ids[1:]  # the one shift: position t predicts token t + 1
    generator = torch.Generator().manual_seed(seed)
    # The head runs in chunks of tokens: all logits of a window at once would be the largest tensor.
    for start in range(0, len(targets), HEAD_CHUNK):
        stop = min(start + HEAD_CHUNK, len(targets))
        with torch.enable_grad():
            logits = model.lm_head(leaf[0, start:stop]).float()  # (chunk, vocab)
            if not torch.isfinite(logits).all():
                raise NotFiniteError("the logits are not finite")
            target = targets[start:stop]
            if labels == "sampled":
                target = sampled_tokens(logits.detach(), generator)
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if not torch.isfinite(total):
        raise NotFiniteError("the loss is not finite")
    return total, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def sampled_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token a row by inverting the distribution function; torch.multinomial draws vocab numbers a row.

    Args:
        logits: ``[T, vocab]`` float32, finite.
        generator: Of the random numbers.

    Returns:
        ``[T]`` int64.
    """
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulated[:, -1:]
    # The first token whose sum is above the point: one of probability 0 cannot be it.
    return torch.searchsorted(cumulated, points, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
