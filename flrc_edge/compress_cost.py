"""What ``compress`` itself takes: memory and disk from a configuration, time from a trial on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from flrc_edge.compress_trial import Trial
from flrc_edge.peak_memory import gram_entries, peak_memory
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.manifest import Storage


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
    disk = 4 * tokens * config.hidden_size * config.num_layers + 8 * gram_entries(config)
    disk += 4 * sum(n * n for _, n in shapes) if integers else 0
    memory = peak_memory(config, window=window, storage=storage, integers=integers)
    return CompressCost(memory, disk, trial.seconds(config, tokens=tokens, window=window))
