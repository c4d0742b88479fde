"""Recipes side by side: perplexity at equal parameters, from one calibration, and what choosing the ranks took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flrc_edge.allocation import check_feasible
from flrc_edge.baselines.rank_search import Search, check_reachable
from flrc_edge.checkpoint import load
from flrc_edge.errors import UsageError
from flrc_edge.heldout import EvaluationText, HeldOut, check_texts, held_out_windows, hold_out
from flrc_edge.machine import machine
from flrc_edge.measurements import window_length
from flrc_edge.models import LoadedModel
from flrc_edge.origin import check_dense
from flrc_edge.placement import placed
from flrc_edge.progress import Progress, Timings, peak_rss_bytes, silent
from flrc_edge.recipe_bench import RecipeBench, SearchTime
from flrc_edge.recipes import RECIPES, REFERENCE, Recipe
from flrc_edge.settings import Settings
from flrc_runtime.manifest import Manifest, RankPlan, read


@dataclass(frozen=True)
class Figure:
    """One recipe at one keep on one text.

    Args:
        recipe: Its name.
        factorization: How the factors were fitted.
        ranks: What chose the ranks.
        storage: How the factors are stored.
        keep: Asked share of the projections' parameters.
        kept: Share that is stored.
        parameters: Projection parameters that are stored.
        dense_projections: How many projections stayed dense.
        text: What perplexity was measured on.
        perplexity: Of the compressed model.
        growth: g = ln perplexity - ln perplexity of the dense model.
        ratio: g divided by that of ``svd-llm``; None if that was not measured or did not lose.
    """

    recipe: str
    factorization: str
    ranks: str
    storage: str
    keep: float
    kept: float
    parameters: int
    dense_projections: int
    text: str
    perplexity: float
    growth: float
    ratio: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All figures and their conditions."""

    model: str
    texts: tuple[EvaluationText, ...]
    window: int
    calibration: str
    calibration_tokens: int
    labels: str
    figures: tuple[Figure, ...]
    searches: tuple[SearchTime, ...]
    seconds: dict[str, float]
    peak_rss_bytes: int
    machine: str


def compare(
    loaded: LoadedModel,
    settings: Settings,
    *,
    keeps: Sequence[float],
    texts: Sequence[str],
    windows: int | None = 20,
    recipes: Sequence[Recipe] = RECIPES,
    checkpoints: Sequence[Path] = (),
    search: Search | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Measure every recipe at every keep on every text.

    Args:
        loaded: The model; left as it was.
        settings: Calibration and rank step; what a recipe names is not used.
        keeps: Shares of projection parameters, each measured alone.
        texts: What perplexity is measured on; must not be calibrated on.
        windows: How many windows of ``settings.window`` tokens from the beginning of each text; None for all.
        checkpoints: Folders of checkpoints of this model to measure beside the recipes, each at its stage 0.
        recipes: Which to compare. ``asvd`` takes more than a thousand evaluations, once for all keeps.
        search: Samples of ASVD's search.
        progress: Called after each unit of work.

    Raises:
        FlrcError: Anything a user can mend; what can be seen before calibration is.
    """
    search = search or Search()
    _check(loaded, settings, keeps=keeps, texts=texts, recipes=recipes)
    measured = [(path, _open_checkpoint(path, loaded)) for path in checkpoints]
    timings = Timings()
    length = window_length(loaded, settings.window)
    cut = held_out_windows(loaded, texts, windows=windows, length=length)
    bench = RecipeBench(loaded, settings, recipes=recipes, search=search, timings=timings, progress=progress)
    with timings.phase("perplexity, dense"):
        held_out = hold_out(loaded, cut, progress=progress)
    figures: dict[tuple[float, str, str], Figure] = {}
    for method in dict.fromkeys(r.factorization for r in recipes):
        group = [r for r in recipes if r.factorization == method]
        bench.factorize(method)
        for recipe in group:
            for done, keep in enumerate(keeps, 1):
                plan = bench.plan(recipe, keep)
                chunks = bench.chunks(recipe, plan)
                with timings.phase("perplexity"), placed(loaded, plan, chunks) as model:
                    for f in _figures(
                        recipe.name, method, recipe.ranks, recipe.storage, plan, model, held_out
                    ):
                        figures[keep, recipe.name, f.text] = f
                progress(f"perplexity, {recipe.name}", done, len(keeps))
    rows = [figures[keep, r.name, name] for keep in keeps for r in recipes for name in cut]
    for path, content in measured:
        healed = ", healed" if "healing.json" in content.files else ""
        ranks = f"{content.plan.allocator}{healed}"
        storages = sorted({p.storage for p in content.plan.projections if not p.dense})
        storage = " and ".join(storages) or "plain"
        with timings.phase("perplexity"):
            rows += _figures(
                path.name, content.factorization, ranks, storage, content.plan, load(path), held_out
            )
        progress(f"perplexity, {path.name}", 1, 1)
    calibration = bench.calibration
    return Comparison(
        model=loaded.name,
        texts=held_out.described(),
        window=length,
        calibration=" + ".join(f"{t.name} ({t.tokens})" for t in calibration.texts),
        calibration_tokens=calibration.tokens,
        labels=settings.labels,
        figures=tuple(_with_ratio(f, figures.get((f.keep, REFERENCE, f.text))) for f in rows),
        searches=bench.search_times(),
        seconds={name: round(seconds, 2) for name, seconds in timings.seconds.items()},
        peak_rss_bytes=peak_rss_bytes(),
        machine=machine(),
    )


def _check(
    loaded: LoadedModel,
    settings: Settings,
    *,
    keeps: Sequence[float],
    texts: Sequence[str],
    recipes: Sequence[Recipe],
) -> None:
    """Refuse what can be refused before anything is measured."""
    if not recipes or not keeps:
        raise UsageError("name at least one recipe and one keep")
    check_texts(texts)
    names = [r.name for r in recipes]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(f"the recipe {twice} is named twice")
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    for recipe in recipes:
        for keep in keeps:
            check_feasible(shapes.values(), (keep,), step=settings.rank_step, storage=recipe.storage)
        if recipe.allocator == "asvd":
            check_reachable(shapes, keeps, step=settings.rank_step, storage=recipe.storage)


def _open_checkpoint(path: Path, loaded: LoadedModel) -> Manifest:
    content = read(path, "checkpoint")
    check_dense(loaded, content, where=path.name)
    return content


def _figures(
    name: str,
    factorization: str,
    ranks: str,
    storage: str,
    plan: RankPlan,
    model: torch.nn.Module,
    held_out: HeldOut,
) -> list[Figure]:
    """Measure a compressed model; return a figure for each text."""
    return [
        Figure(
            recipe=name,
            factorization=factorization,
            ranks=ranks,
            storage=storage,
            keep=plan.keep[0],
            kept=round(plan.kept(0), 5),
            parameters=plan.activated(0),
            dense_projections=sum(p.dense for p in plan.projections),
            text=text,
            perplexity=round(value, 3),
            growth=held_out.growth(text, value),
        )
        for text, value in held_out.perplexities(model).items()
    ]


def _with_ratio(figure: Figure, reference: Figure | None) -> Figure:
    ratio = round(figure.growth / reference.growth, 4) if reference and reference.growth > 0 else None
    return replace(figure, growth=round(figure.growth, 4), ratio=ratio)
