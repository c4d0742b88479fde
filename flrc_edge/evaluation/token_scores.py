"""Scores of single tokens: negative log-likelihood, KL(dense || model) and top-1 agreement, in nats.

Logits of a long window and a large vocabulary fill memory, so they become log-probabilities in place, and
temporaries hold a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flrc_edge.errors import NumericalError

ROW_VALUES = 2**23  # float32 values of a temporary: 32 MiB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """Scores ``[N]`` of N tokens; ``kl`` and ``top1`` (1 where the most likely tokens agree) need a dense model."""

    nll: Array
    kl: Array | None
    top1: Array | None


@torch.no_grad()
def log_probs_(logits: Tensor) -> Tensor:
    """Turn float32 logits ``[N, vocab]`` into log-probabilities in place, and return them."""
    for rows in _rows(logits):
        rows -= rows.logsumexp(-1, keepdim=True)
    return logits


@torch.no_grad()
def token_scores(
    log_probs: Tensor, targets: Tensor, *, dense: Tensor | None = None, where: str = "the text"
) -> TokenScores:
    """Score tokens.

    Args:
        log_probs: ``[N, vocab]`` float32, the model's.
        targets: ``[N]``, the token after each row.
        dense: ``[N, vocab]`` float32, the dense model's.
        where: What an error names.

    Raises:
        NumericalError: A score is not finite.
    """
    nll = -log_probs.gather(1, targets[:, None])[:, 0].double().numpy()
    kl = top1 = None
    if dense is not None:
        divergences, same = [], []
        for p, q in zip(_rows(dense), _rows(log_probs), strict=True):
            divergences.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
            same.append(p.argmax(-1) == q.argmax(-1))
        kl = torch.cat(divergences).numpy()
        top1 = torch.cat(same).double().numpy()
    for name, values in (("loss", nll), ("divergence from the dense model", kl)):
        if values is not None and not np.isfinite(values).all():
            raise NumericalError(f"the {name} on {where} is not finite")
    return TokenScores(nll, kl, top1)


def _rows(values: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(values, max(1, ROW_VALUES // values.shape[1])))
