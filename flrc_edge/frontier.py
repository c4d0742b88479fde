"""Quality against bytes: the dense model, baselines and ours in every number format, from one calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from flrc_edge.allocation import check_feasible
from flrc_edge.baselines.rank_search import Search
from flrc_edge.chunks import Chunk
from flrc_edge.errors import UsageError
from flrc_edge.heldout import EvaluationText, check_texts, held_out_windows, hold_out
from flrc_edge.integers import quantize_model, round_model, with_formats
from flrc_edge.machine import machine
from flrc_edge.measurements import input_grams, window_length
from flrc_edge.models import LoadedModel
from flrc_edge.placement import placed_integers, stored_chunks
from flrc_edge.planning import plan_sizes
from flrc_edge.progress import Progress, Timings, peak_rss_bytes, silent
from flrc_edge.recipe_bench import RecipeBench
from flrc_edge.recipes import RECIPES, Recipe
from flrc_edge.settings import Settings
from flrc_exporters.weight_table import file_size
from flrc_runtime.manifest import ProjectionPlan, RankPlan

Role = Literal["ours", "baseline", "dense"]  # as figures draw them
HEAD = "int8"  # of embedding and head, but for mixed formats
NEAREST = ("int8/32", "int4/32", "int4/128", "int2/32")
COMPENSATED = ("int4/32", "int4/128", "int2/32")
BASELINES = ("svd-llm", "flra-gw2")
OURS = "measured-two-sided"


@dataclass(frozen=True)
class Point:
    """One compressed model on one text.

    Args:
        series: What it is one of.
        role: ``ours``, ``baseline`` or ``dense``.
        label: Its keep, format or bits.
        bytes: Of the exported weight file.
        bits: Mean of a parameter of the original model, everything in the file counted.
        kept: Share of the projections' parameters that is stored.
        text: What perplexity was measured on.
        perplexity: Of it.
        growth: ln perplexity - ln perplexity of the dense model in floats.
    """

    series: str
    role: Role
    label: str
    bytes: int
    bits: float
    kept: float
    text: str
    perplexity: float
    growth: float


@dataclass(frozen=True)
class Frontier:
    """All points and their conditions."""

    model: str
    parameters: int
    texts: tuple[EvaluationText, ...]
    window: int
    calibration: str
    calibration_tokens: int
    storage: str
    points: tuple[Point, ...]
    seconds: dict[str, float]
    peak_rss_bytes: int
    machine: str


@dataclass(frozen=True)
class _Candidate:
    series: str
    role: Role
    label: str
    plan: RankPlan
    chunks: Mapping[str, Sequence[Chunk]]
    nearest: bool = False


def frontier(
    loaded: LoadedModel,
    settings: Settings,
    *,
    bits: Sequence[float],
    keeps: Sequence[float],
    texts: Sequence[str],
    windows: int | None = 8,
    progress: Progress = silent,
) -> Frontier:
    """Measure perplexity and bytes of the dense model, of baselines and of ours.

    Args:
        loaded: The model; left as it was.
        settings: Calibration, rank step and the storage form of ours.
        bits: Mean bits a parameter of the whole file that mixed plans are made for.
        keeps: Shares of projection parameters of plans with one number format.
        texts: What perplexity is measured on; must not be calibrated on.
        windows: How many windows of ``settings.window`` tokens from the beginning of each text; None for all.
        progress: Called after each unit of work.

    Raises:
        FlrcError: Anything a user can mend.
    """
    if not keeps or not bits:
        raise UsageError("name at least one keep and one number of bits")
    check_texts(texts)
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    for keep in keeps:
        check_feasible(shapes.values(), (keep,), step=settings.rank_step, storage="plain")
    timings = Timings()
    length = window_length(loaded, settings.window)
    cut = held_out_windows(loaded, texts, windows=windows, length=length)
    ours = next(r for r in RECIPES if r.name == OURS).stored(settings.stored)
    recipes = [*(r for r in RECIPES if r.name in BASELINES), ours]
    bench = RecipeBench(
        loaded, settings, recipes=recipes, search=Search(), timings=timings, progress=progress
    )
    with timings.phase("input moments"):
        grams, inputs = input_grams(loaded, settings, progress=progress)
    with timings.phase("perplexity, dense"):
        held_out = hold_out(loaded, cut, progress=progress)
    parameters = loaded.config.parameters()
    points: list[Point] = []
    candidates = _candidates(
        loaded, settings, bench, recipes, grams, inputs, bits=bits, keeps=keeps, progress=progress
    )
    for c in candidates:
        with timings.phase("round"):
            if c.nearest:
                integers = round_model(loaded.model, c.plan, c.chunks)
            else:
                integers = quantize_model(loaded.model, c.plan, c.chunks, grams, progress=progress)
        size = file_size(loaded.decoder, c.plan, context=loaded.decoder.export_context())
        with timings.phase("perplexity"), placed_integers(loaded, c.plan, c.chunks, integers) as model:
            points += [
                Point(
                    c.series,
                    c.role,
                    c.label,
                    size,
                    round(8 * size / parameters, 3),
                    round(c.plan.kept(0), 4),
                    text,
                    round(value, 3),
                    round(held_out.growth(text, value), 4),
                )
                for text, value in held_out.perplexities(model).items()
            ]
        progress(f"{c.series}, {c.label}", 1, 1)
    calibration = bench.calibration
    return Frontier(
        model=loaded.name,
        parameters=parameters,
        texts=held_out.described(),
        window=length,
        calibration=" + ".join(f"{t.name} ({t.tokens})" for t in calibration.texts),
        calibration_tokens=calibration.tokens,
        storage=settings.stored,
        points=tuple(points),
        seconds={name: round(seconds, 2) for name, seconds in timings.seconds.items()},
        peak_rss_bytes=peak_rss_bytes(),
        machine=machine(),
    )


def _candidates(
    loaded: LoadedModel,
    settings: Settings,
    bench: RecipeBench,
    recipes: Sequence[Recipe],
    grams: Mapping[str, Tensor],
    inputs: str,
    *,
    bits: Sequence[float],
    keeps: Sequence[float],
    progress: Progress,
) -> Iterator[_Candidate]:
    """Yield every model to measure."""
    rounded = partial(with_formats, head=HEAD, hidden_size=loaded.config.hidden_size)
    dense = RankPlan(
        "dense",
        (1.0,),
        tuple(ProjectionPlan(p.name, p.shape, (None,)) for p in loaded.config.projections()),
    )
    for name in NEAREST:
        yield _Candidate("dense, nearest", "dense", name, rounded(dense, name), {}, True)
    for name in COMPENSATED:
        yield _Candidate("dense, compensated", "dense", name, rounded(dense, name), {})
    *baselines, ours = recipes
    for recipe in baselines:
        bench.factorize(recipe.factorization)
        for keep in keeps:
            plan = rounded(bench.plan(recipe, keep), "int4")
            chunks = stored_chunks(plan, bench.factors)
            yield _Candidate(f"{recipe.name}, int4 nearest", "baseline", f"{keep:g}", plan, chunks, True)
    bench.factorize(ours.factorization)
    for share in bits:
        chosen = replace(
            settings,
            sizes=(round(share * loaded.config.parameters() / 8),),
            dtype="mixed",
            allocator="measured",
        )
        plan = plan_sizes(
            loaded,
            chosen,
            bench.moments,
            bench.factors,
            grams,
            fingerprint=f"{bench.calibration.fingerprint} {inputs}",
            progress=progress,
        )
        yield _Candidate("ours, mixed", "ours", f"{share:g} bit", plan, stored_chunks(plan, bench.factors))
    for keep in keeps:
        floats = bench.plan(ours, keep)
        chunks = stored_chunks(floats, bench.factors)
        for name, nearest in (("int8", False), ("int4", False), ("int4", True)):
            series = f"ours, {name}{' nearest' if nearest else ''}"
            yield _Candidate(series, "ours", f"{keep:g}", rounded(floats, name), chunks, nearest)
