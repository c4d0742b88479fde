"""Speed, memory and loading of a bundle, stage by stage, beside peers measured in the same run."""

from __future__ import annotations

from .result import BenchResult, Loading, Row, move_ms
from .run import bench

__all__ = ["BenchResult", "Loading", "Row", "bench", "move_ms"]
