"""How much memory ``compress`` takes at its peak, from a configuration alone, and whether it is there."""

from __future__ import annotations

import logging

from flrc_edge.factorization import largest_rank
from flrc_edge.progress import peak_rss_bytes
from flrc_edge.token_loss import HEAD_CHUNK
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.diagnosis import memory_bytes
from flrc_runtime.manifest import Storage

# Python with torch and transformers; buffers of an entry of the logits; of a hidden and of an intermediate entry of a
# token in one layer. Found on the peaks of SmolLM2-135M and the 1.5 B Qwen, phase by phase.
PROGRAM_BYTES, LOGIT_BYTES, HIDDEN_COPIES, INTERMEDIATE_COPIES = 650_000_000, 24, 10, 8
GRAM_COPIES = 4  # float64, of the widest input, while a matrix is rounded

_log = logging.getLogger(__name__)


def peak_memory(config: DecoderConfig, *, window: int, storage: Storage, integers: bool) -> int:
    """Return the bytes of the process at its peak, within 7 % on the models of docs/benchmarks.md.

    Args:
        config: The model.
        window: Tokens of one calibration window.
        storage: Of factors.
        integers: Whether matrices are rounded to integers.
    """
    shapes = [p.shape for p in config.projections()]
    ranks = [largest_rank(shape, storage) for shape in shapes]
    factors = sum(r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))
    logits = LOGIT_BYTES * HEAD_CHUNK * config.vocab_size
    layer = 4 * window * (HIDDEN_COPIES * config.hidden_size + INTERMEDIATE_COPIES * config.intermediate_size)
    rounding = 8 * GRAM_COPIES * max(n for _, n in shapes) ** 2 if integers else 0
    grams = 8 * gram_entries(config) // config.num_layers
    return (
        PROGRAM_BYTES
        + 4 * config.parameters()
        + max(grams + max(logits, layer), 4 * factors + max(logits, layer, rounding))
    )


def gram_entries(config: DecoderConfig) -> int:
    """Return the entries of all statistics: energy, weighted energy and gradient of every projection."""
    return 3 * sum(min(p.shape) ** 2 for p in config.projections())


def warn_if_scarce(need: int) -> None:
    """Say so when a process that takes ``need`` bytes at its peak may not find them.

    A warning and no refusal: there may be swap space, and other programs may end.
    """
    found = memory_bytes()
    if found is None:
        return
    free = found[1] + peak_rss_bytes()  # what this process has is its own already
    if need > free:
        _log.warning(
            "this takes about %.1f GB of memory and %.1f GB are free; a run that is killed for it goes on when the "
            "same command is given again, with other programs ended",
            need / 1e9,
            free / 1e9,
        )
