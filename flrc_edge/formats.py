"""What rounding the dense model to int8 or int4 costs, through the exported graphs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flrc_edge.compression import compress
from flrc_edge.evaluation.bundle_perplexity import bundle_logits
from flrc_edge.measurements import window_length
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.settings import Settings
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_exporters.number_format import Dtype
from flrc_runtime import load

# Projections, embedding and head, and whether rounding is compensated; the first is what the others are compared with.
FORMATS: tuple[tuple[Dtype, Dtype, bool], ...] = (
    ("fp32", "fp32", False),
    ("int8", "int8", False),
    ("int4", "int8", False),
    ("int4", "int4", False),
    ("int4", "int4", True),
    ("int4/128", "int4/128", False),
    ("int4/128", "int4/128", True),
)


@dataclass(frozen=True)
class FormatFigure:
    """One number format against fp32: KL in nats per token, share of positions with the same top token."""

    dtype: str
    head: str
    compensated: bool
    weight_bytes: int
    perplexity: float
    mean_kl: float
    top1: float


@dataclass(frozen=True)
class FormatComparison:
    """All formats and their conditions."""

    model: str
    text: str
    tokens: int
    onnxruntime: str
    formats: tuple[FormatFigure, ...]


def compare_formats(
    loaded: LoadedModel,
    *,
    text: str,
    windows: int = 4,
    window: int = 512,
    formats: Sequence[tuple[Dtype, Dtype, bool]] = FORMATS,
    progress: Progress = silent,
) -> FormatComparison:
    """Export the dense model in every format and compare the logits on real text.

    Args:
        loaded: The model.
        text: Source of the tokens.
        windows: How many windows from its beginning.
        window: Tokens of each.
        formats: Number formats of projections and head, and whether to compensate rounding errors as ``compress
            --dtype`` does; the first is the reference.
        progress: Called after each unit of work.
    """
    import onnxruntime

    ids = token_windows(
        loaded.tokenizer,
        (WeightedText(text),),
        windows=windows,
        length=window_length(loaded, window),
        vocab_size=loaded.config.vocab_size,
    ).ids
    figures: list[FormatFigure] = []
    reference: list[Tensor] = []
    with tempfile.TemporaryDirectory() as scratch:
        floats, integers, bundle = (Path(scratch) / name for name in ("floats", "integers", "bundle"))
        compress(loaded, floats, Settings(keep=(1.0,)))
        for dtype, head, compensated in formats:
            if compensated and dtype != "fp32" and head != "fp32":
                settings = Settings(keep=(1.0,), dtype=dtype, head=head)
                compress(loaded, integers, settings, overwrite=True, progress=progress)
                export(integers, bundle, overwrite=True)
            else:
                export(floats, bundle, dtype=dtype, head=head, overwrite=True)
            logits = bundle_logits(load(bundle), 0)
            loss, kl, same = 0.0, [], []
            for i, row in enumerate(ids):
                log_probs = logits(row[None])[:-1].double().log_softmax(-1)
                if len(reference) <= i:
                    reference.append(log_probs.float())
                dense = reference[i].double()
                loss -= log_probs.gather(1, row[1:, None]).sum().item()
                kl.append((dense.exp() * (dense - log_probs)).sum(-1))
                same.append(dense.argmax(-1) == log_probs.argmax(-1))
                progress(f"{dtype}, head {head}", i + 1, len(ids))
            size = (bundle / "weights.bin").stat().st_size
            ppl = math.exp(loss / (ids.shape[0] * (ids.shape[1] - 1)))
            figures.append(
                FormatFigure(
                    dtype,
                    head,
                    compensated,
                    size,
                    round(ppl, 3),
                    round(float(np.mean(torch.cat(kl).numpy())), 5),
                    round(torch.cat(same).double().mean().item(), 4),
                )
            )
    return FormatComparison(
        loaded.name, Path(text).name, ids.numel(), onnxruntime.__version__, tuple(figures)
    )
