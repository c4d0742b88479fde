"""The machine that a figure was measured on, in one line."""

from __future__ import annotations

import platform

import torch


def machine() -> str:
    """Return architecture, threads and torch's version, as tables show them."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
