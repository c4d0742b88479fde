"""Statistics kept between runs, so that another keep or other stages need no second calibration.

Files are named by the fingerprint of model, texts and settings; the oldest are removed beyond a few.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flrc_edge.cache import cache_folder
from flrc_edge.calibration import Moments, Statistics, is_main_process

KEPT = 3  # SmolLM2-135M's statistics take 0.7 GB
_log = logging.getLogger(__name__)


def cached_statistics(fingerprint: str | None, compute: Callable[[], Statistics]) -> Statistics:
    """Return the statistics stored under ``fingerprint``, or compute and store them.

    Args:
        fingerprint: None computes without storing.
        compute: Measures them. Under ``accelerate launch`` every process must reach it together.

    A cache that cannot be read or written is not an error.
    """
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    path = (
        None
        if fingerprint is None or distributed
        else cache_folder() / "statistics" / f"{fingerprint}.safetensors"
    )
    if path is not None and path.exists():
        try:
            found = _read(path)
            _log.info("statistics taken from the cache")
            return found
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            _log.warning("a cached statistics file is damaged and is measured again: %s", error)
    result = compute()
    if path is not None and is_main_process():
        try:
            _write(path, result)
        except (SafetensorError, OSError) as error:
            _log.warning("the statistics could not be cached: %s", error)
    return result


def _write(path: Path, statistics: Statistics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"": torch.tensor([statistics.loss, statistics.tokens], dtype=torch.float64)}
    for name, m in statistics.moments.items():
        tensors[f"{name}.energy"] = m.energy
        tensors[f"{name}.gradient"] = m.gradient
        scalars = [m.gradient_trace, m.fisher_g2, m.fisher_gw2]
        tensors[f"{name}.scalars"] = torch.tensor(scalars, dtype=torch.float64)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    stored = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in stored[KEPT:]:
        old.unlink(missing_ok=True)


def _read(path: Path) -> Statistics:
    with safe_open(path, framework="pt") as file:
        loss, tokens = file.get_tensor("").tolist()
        names = [key.removesuffix(".energy") for key in file.keys() if key.endswith(".energy")]  # noqa: SIM118
        moments = {
            name: Moments(
                file.get_tensor(f"{name}.energy"),
                file.get_tensor(f"{name}.gradient"),
                *file.get_tensor(f"{name}.scalars").tolist(),
            )
            for name in names
        }
    return Statistics(moments, loss, int(tokens))
