"""Speed, memory and loading of bundles, stage by stage, beside peers whose steps are taken in turn with ours."""

from __future__ import annotations

from .result import BenchResult, Beside, Loading, Move, Operators, Row
from .run import bench

__all__ = ["BenchResult", "Beside", "Loading", "Move", "Operators", "Row", "bench"]
