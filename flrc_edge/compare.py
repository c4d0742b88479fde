"""Allocators side by side: perplexity at equal parameters, from one calibration, and the time of each phase."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from flrc_edge.allocation import Allocator, check_feasible
from flrc_edge.compression import (
    Settings,
    Timings,
    compressed,
    factorize_all,
    measure,
    plan_ranks,
    window_length,
)
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.factorization import Method
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, peak_rss_bytes, silent
from flrc_edge.texts import WeightedText, token_windows


@dataclass(frozen=True)
class Figure:
    """The perplexity of one plan."""

    keep: float
    kept: float
    allocator: str
    factorization: str
    dense_projections: int
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """All figures and their conditions."""

    model: str
    text: str
    evaluation_tokens: int
    window: int
    calibration: str
    calibration_tokens: int
    dense_perplexity: float
    figures: tuple[Figure, ...]
    seconds: dict[str, float]
    peak_rss_bytes: int
    machine: str


def compare(
    loaded: LoadedModel,
    settings: Settings,
    *,
    keeps: Sequence[float],
    text: str,
    windows: int | None = 20,
    allocators: Sequence[Allocator] = get_args(Allocator),
    methods: Sequence[Method] = ("two-sided", "one-sided"),
    progress: Progress = silent,
) -> Comparison:
    """Measure every allocator with every factorization at every keep.

    Args:
        loaded: The model.
        settings: Calibration; its keep, allocator and factorization are not used.
        keeps: Shares of projection parameters, each measured alone.
        text: What perplexity is measured on; must not be calibrated on.
        windows: How many windows of ``settings.window`` tokens from its beginning; None for all.
        allocators: Which to compare.
        methods: Which factorizations to compare.
        progress: Called after each unit of work.
    """
    timings = Timings()
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    for keep in keeps:
        check_feasible(shapes.values(), (keep,), step=settings.rank_step)
    length = window_length(loaded, settings.window)
    test = token_windows(loaded.tokenizer, (WeightedText(text),), windows=windows, length=length).ids
    statistics, calibration = measure(loaded, settings, progress=progress, timings=timings)
    with timings.phase("perplexity of one model"):
        dense = perplexity(torch_logits(loaded.model), test, progress=progress, phase="perplexity, dense")
    figures = []
    for method in methods:
        with timings.phase(f"factorize {method}"):
            factors = factorize_all(loaded, statistics.moments, method=method, progress=progress)
        for keep in keeps:
            for allocator in allocators:
                chosen = replace(settings, keep=(keep,), allocator=allocator, factorization=method)
                with timings.phase(f"allocate {allocator}"):
                    plan = plan_ranks(shapes, chosen, statistics.moments, factors)
                with compressed(loaded, plan, factors) as model:
                    value = perplexity(
                        torch_logits(model),
                        test,
                        progress=progress,
                        phase=f"perplexity, {allocator} {keep:g}",
                    )
                dense_count = sum(p.dense for p in plan.projections)
                figures.append(
                    Figure(keep, round(plan.kept(0), 5), allocator, method, dense_count, round(value, 3))
                )
    return Comparison(
        model=loaded.name,
        text=Path(text).name,
        evaluation_tokens=test.numel(),
        window=length,
        calibration=" + ".join(f"{t.name} ({t.tokens})" for t in calibration.texts),
        calibration_tokens=calibration.tokens,
        dense_perplexity=round(dense, 3),
        figures=tuple(figures),
        seconds={name: round(seconds, 2) for name, seconds in timings.seconds.items()},
        peak_rss_bytes=peak_rss_bytes(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )
