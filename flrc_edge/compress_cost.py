"""What ``compress`` itself takes: memory and disk from a configuration, time from a trial on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from flrc_edge.compress_trial import Trial
from flrc_edge.factorization import largest_rank
from flrc_edge.token_loss import HEAD_CHUNK
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.manifest import Storage

# Python with torch and transformers; buffers of an entry of the logits; of a hidden and of an intermediate entry of a
# token in one layer. Found on the peaks of SmolLM2-135M and the 1.5 B Qwen, phase by phase.
PROGRAM_BYTES, LOGIT_BYTES, HIDDEN_COPIES, INTERMEDIATE_COPIES = 650_000_000, 24, 10, 8
GRAM_COPIES = 4  # float64, of the widest input, while a matrix is rounded


@dataclass(frozen=True)
class CompressCost:
    """What compressing takes.

    Args:
        memory_bytes: Of the process, at its peak.
        disk_bytes: In the cache folder while it runs: inputs of all layers, and statistics, which stay.
        seconds: About, nothing else running.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float


def compress_cost(
    config: DecoderConfig, *, tokens: int, window: int, storage: Storage, integers: bool, trial: Trial
) -> CompressCost:
    """Estimate one ``compress`` with the default allocator and factorization.

    Args:
        config: The model.
        tokens: Of the calibration.
        window: Tokens of one window.
        storage: Of factors.
        integers: Whether matrices are rounded to integers.
        trial: On this machine.
    """
    shapes = [p.shape for p in config.projections()]
    layers, hidden, vocab = config.num_layers, config.hidden_size, config.vocab_size
    grams = 3 * sum(min(shape) ** 2 for shape in shapes)  # entries: energy, weighted energy, gradient
    ranks = [largest_rank(shape, storage) for shape in shapes]
    factors = sum(r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))
    widest = max(n for _, n in shapes)
    logits = LOGIT_BYTES * HEAD_CHUNK * vocab
    layer = 4 * window * (HIDDEN_COPIES * hidden + INTERMEDIATE_COPIES * config.intermediate_size)
    rounding = 8 * GRAM_COPIES * widest**2 if integers else 0
    memory = (
        PROGRAM_BYTES
        + 4 * config.parameters()
        + max(8 * grams // layers + max(logits, layer), 4 * factors + max(logits, layer, rounding))
    )
    disk = 4 * tokens * hidden * layers + 8 * grams
    disk += 4 * sum(n * n for _, n in shapes) if integers else 0
    return CompressCost(memory, disk, trial.seconds(config, tokens=tokens, window=window))
