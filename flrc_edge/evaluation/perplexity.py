"""Perplexity by one fixed protocol.

Non-overlapping windows from the beginning of the text; each window starts with BOS only if the tokenizer adds one;
every token after a window's first is counted once; a value that is not finite is an error, never skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.errors import NumericalError
from flrc_edge.progress import Progress, silent

Logits = Callable[[Tensor], Tensor]  # ids [1, T] -> logits [T, vocab]


def torch_logits(model: Any) -> Logits:
    """Return the logits function of a Hugging Face model."""

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return result

    return logits


@torch.no_grad()
def perplexity(
    logits: Logits, ids: Tensor, *, progress: Progress = silent, phase: str = "perplexity"
) -> float:
    """Return ``exp`` of the mean negative log-likelihood (nats per token).

    Args:
        logits: Maps ids ``[1, T]`` to logits ``[T, vocab]``.
        ids: ``[windows, T]`` int64.
        progress: Called after every window.
        phase: What the progress is called.

    Raises:
        NumericalError: A window's loss is not finite.
    """
    total, count = 0.0, 0
    for i, window in enumerate(ids):
        value = nn.functional.cross_entropy(
            logits(window[None])[:-1].float(), window[1:], reduction="sum"
        ).item()
        if not math.isfinite(value):
            raise NumericalError(f"the loss of evaluation window {i} is not finite")
        total += value
        count += len(window) - 1
        progress(phase, i + 1, len(ids))
    return math.exp(total / count)
