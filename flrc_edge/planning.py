"""Factors and rank plan of a model, from what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from flrc_edge import allocation, selection
from flrc_edge.bit_allocation import Formats, joint_plan
from flrc_edge.calibration import Moments
from flrc_edge.factorization import Factors, Method, factorize
from flrc_edge.measurements import calibration_windows, tried_roundings
from flrc_edge.models import LoadedModel
from flrc_edge.placement import compressed
from flrc_edge.progress import Progress, silent
from flrc_edge.rounding_losses import RoundingLosses
from flrc_edge.settings import Settings
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Storage


def factorize_all(
    loaded: LoadedModel,
    moments: Mapping[str, Moments],
    *,
    method: Method = "two-sided",
    storage: Storage = "plain",
    progress: Progress = silent,
) -> dict[str, Factors]:
    """Factorize every projection up to the largest rank its storage form can use."""
    factors = {}
    for done, (name, m) in enumerate(moments.items(), 1):
        weight = loaded.model.get_parameter(f"{name}.weight").detach()
        factors[name] = factorize(weight, m, method=method, storage=storage, name=name)
        progress("factorize", done, len(moments))
    return factors


def plan_ranks(
    shapes: Mapping[str, tuple[int, int]],
    settings: Settings,
    moments: Mapping[str, Moments] | None,
    factors: Mapping[str, Factors],
) -> RankPlan:
    """Choose the ranks of every projection and stage."""
    if moments is None:
        dense = tuple(ProjectionPlan(name, shape, (None,)) for name, shape in shapes.items())
        return RankPlan(settings.allocator, settings.keep, dense)
    scores = allocation.fisher_scores(shapes, moments, score=settings.score)
    step, storage = settings.rank_step, settings.stored
    if settings.allocator == "uniform":
        curves = allocation.uniform_curves(shapes, step=step, storage=storage)
    elif settings.allocator == "fisher":
        curves = allocation.fisher_curves(shapes, moments, score=settings.score, step=step, storage=storage)
    elif settings.allocator in ("measured", "search"):  # which search then compares with others
        curves = allocation.measured_curves(factors, step=step, storage=storage)
    else:
        curves = allocation.spectrum_curves(factors, step=step, storage=storage)
    return allocation.allocate(curves, settings.keep, allocator=settings.allocator, scores=scores)


def search_plan(
    loaded: LoadedModel,
    settings: Settings,
    scores: Mapping[str, float],
    factors: Mapping[str, Factors],
    *,
    progress: Progress = silent,
) -> RankPlan:
    """Compare candidate plans on the windows held out of the calibration."""
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    plans = selection.candidates(
        shapes,
        factors,
        settings.keep,
        step=settings.rank_step,
        storage=settings.stored,
        scores=scores,
    )
    return selection.select(
        loaded.model,
        plans,
        calibration_windows(loaded, settings, held_out=True).ids,
        lambda plan: compressed(loaded, plan, factors),
        progress=progress,
    )


def plan_sizes(
    loaded: LoadedModel,
    settings: Settings,
    moments: Mapping[str, Moments],
    factors: Mapping[str, Factors],
    grams: Mapping[str, Tensor],
    *,
    fingerprint: str,
    progress: Progress = silent,
) -> RankPlan:
    """Choose ranks, and number formats where the settings leave them open, for the sizes of the settings in bytes.

    Args:
        loaded: The original model.
        settings: With ``sizes``.
        moments: Of every projection.
        factors: Of every projection; with measured losses for the allocator ``measured``.
        grams: From :func:`flrc_edge.measurements.input_grams`; needed for mixed formats.
        fingerprint: Of everything that factors and grams were computed from.
        progress: Called after each unit of work.

    Raises:
        UsageError: A size is below the smallest plan.
    """
    storages = settings.storages
    curve = allocation.measured_curves if settings.allocator == "measured" else allocation.spectrum_curves
    curves = [curve(factors, step=settings.rank_step, storage=storage) for storage in storages]
    if settings.dtype == "mixed":
        rounding, embedding = tried_roundings(
            loaded,
            settings,
            factors,
            moments,
            grams,
            storages=storages,
            fingerprint=fingerprint,
            progress=progress,
        )
    else:  # one format for all: rounding costs about the same whatever the ranks
        formats = Formats.of(settings.dtype, settings.head)
        alike = RoundingLosses(
            dict.fromkeys(formats.dense, 0.0),
            {storage: {formats.factored[-1 if storage == "pivoted" else 0]: 0.0} for storage in storages},
        )
        rounding, embedding = dict.fromkeys(factors, alike), dict.fromkeys(formats.embedding, 0.0)
    plan = joint_plan(
        loaded.decoder,
        curves,
        rounding,
        embedding,
        settings.sizes,
        allocator=settings.allocator,
        scores=allocation.fisher_scores(
            {p: c.shape for p, c in zip(factors, curves[0], strict=True)}, moments
        ),
    )
    if settings.dtype != "float":
        return plan
    return replace(plan, projections=tuple(replace(p, formats=()) for p in plan.projections), embedding="")
