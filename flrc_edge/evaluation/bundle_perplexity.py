"""Perplexity of an exported stage, by the protocol of perplexity.py but through onnxruntime."""

from __future__ import annotations

import torch
from torch import Tensor

from flrc_edge.evaluation.perplexity import Logits, perplexity
from flrc_edge.progress import Progress, silent
from flrc_runtime.engine import Model


def bundle_logits(model: Model, stage: int) -> Logits:
    """Return the logits function of one stage of a loaded bundle."""

    def logits(ids: Tensor) -> Tensor:
        return torch.from_numpy(model.logits(ids[0].tolist(), stages=stage))

    return logits


def bundle_perplexity(
    model: Model, ids: Tensor, *, stage: int, progress: Progress = silent, phase: str = "perplexity"
) -> float:
    """Return the perplexity of one stage on ``ids: [windows, T]``."""
    return perplexity(bundle_logits(model, stage), ids, progress=progress, phase=phase)
