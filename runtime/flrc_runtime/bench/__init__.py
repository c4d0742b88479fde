"""Speed, memory and loading of a bundle, stage by stage, beside peers measured in the same run."""

from __future__ import annotations

from .result import BenchResult, Loading, Operators, Row, move_ms
from .run import bench

__all__ = ["BenchResult", "Loading", "Operators", "Row", "bench", "move_ms"]
