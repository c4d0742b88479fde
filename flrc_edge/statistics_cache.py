"""Statistics kept between runs, so that another keep or other stages need no second calibration.

Files are named by the fingerprint of model, texts and settings; the oldest are removed beyond a few.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flrc_edge.calibration import Moments, Statistics, is_main_process
from flrc_runtime.cache import cache_folder

# Files of each kind. SmolLM2-135M's statistics take 1.1 GB, its input moments 0.5 GB, losses 1 MB.
KEPT = {"statistics": 3, "input-moments": 2, "losses": 24, "rounding": 24}
T = TypeVar("T")
_log = logging.getLogger(__name__)


def cached_statistics(fingerprint: str | None, compute: Callable[[], Statistics]) -> Statistics:
    """Return the statistics stored under ``fingerprint``, or compute and store them.

    Args:
        fingerprint: None computes without storing.
        compute: Measures them. Under ``accelerate launch`` every process must reach it together.

    A cache that cannot be read or written is not an error.
    """
    return _cached("statistics", fingerprint, compute, _pack, _unpack)


def cached_tensors(kind: str, key: str | None, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a kind (see ``KEPT``) stored under ``key``, or compute and store them; None: not stored."""
    return _cached(kind, key, compute, dict, dict)


def _cached(
    kind: str,
    key: str | None,
    compute: Callable[[], T],
    pack: Callable[[T], dict[str, Tensor]],
    unpack: Callable[[dict[str, Tensor]], T],
) -> T:
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    path = None if key is None or distributed else cache_folder() / kind / f"{key}.safetensors"
    if path is not None and path.exists():
        try:
            found = unpack(load_file(path))
            _log.info("%s taken from the cache", kind)
            return found
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            _log.warning("a cached %s file is damaged and is measured again: %s", kind, error)
    result = compute()
    if path is not None and is_main_process():
        try:
            _store(path, pack(result), kept=KEPT[kind])
        except (SafetensorError, OSError) as error:
            _log.warning("the %s could not be cached: %s", kind, error)
    return result


def _store(path: Path, tensors: dict[str, Tensor], *, kept: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    stored = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in stored[kept:]:
        old.unlink(missing_ok=True)


def _pack(statistics: Statistics) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"": torch.tensor([statistics.loss, statistics.tokens], dtype=torch.float64)}
    for name, m in statistics.moments.items():
        tensors[f"{name}.energy"] = m.energy
        tensors[f"{name}.gradient"] = m.gradient
        tensors[f"{name}.weighted"] = m.energy if m.weighted is None else m.weighted
        scalars = [m.gradient_trace, m.fisher_g2, m.fisher_gw2]
        tensors[f"{name}.scalars"] = torch.tensor(scalars, dtype=torch.float64)
    return tensors


def _unpack(tensors: dict[str, Tensor]) -> Statistics:
    loss, tokens = tensors[""].tolist()
    names = [key.removesuffix(".energy") for key in tensors if key.endswith(".energy")]
    moments = {name: _moments(tensors, name) for name in names}
    return Statistics(moments, loss, int(tokens))


def _moments(tensors: dict[str, Tensor], name: str) -> Moments:
    energy, gradient, weighted = (tensors[f"{name}.{part}"] for part in ("energy", "gradient", "weighted"))
    trace, g2, gw2 = tensors[f"{name}.scalars"].tolist()
    return Moments(energy, gradient, trace, g2, gw2, weighted)
