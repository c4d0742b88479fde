"""Compress a causal language model into nested low-rank factors (FLRC) and export it for onnxruntime."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flrc_edge.checkpoint import load
    from flrc_edge.compression import compress
    from flrc_edge.lowrank import set_stage
    from flrc_edge.models import open_model

__version__ = "0.1.0"
__all__ = ["__version__", "compress", "load", "open_model", "set_stage"]

_WHERE = {"load": "checkpoint", "compress": "compression", "set_stage": "lowrank", "open_model": "models"}


def __getattr__(name: str) -> Any:
    # The command line imports this package and must not pull in torch.
    if name in _WHERE:
        return getattr(import_module(f"flrc_edge.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
