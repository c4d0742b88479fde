"""Factors and rank plan of any recipe from one calibration, and the wall time of every way to choose ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from time import perf_counter

from flrc_edge.baselines.asvd import asvd_factors, channel_means
from flrc_edge.baselines.rank_search import Search, search_ranks, sensitivities
from flrc_edge.baselines.sensitivity_store import SensitivityStore, Truncation
from flrc_edge.baselines.svd import svd_factors
from flrc_edge.calibration import Moments, calibrate
from flrc_edge.chunks import Chunk
from flrc_edge.correction import correct
from flrc_edge.factorization import Factors, Method
from flrc_edge.measurements import (
    calibration_windows,
    correction_windows,
    measure,
    window_length,
    with_losses,
)
from flrc_edge.models import LoadedModel
from flrc_edge.placement import stored_chunks
from flrc_edge.planning import factorize_all, plan_ranks, search_plan
from flrc_edge.progress import Progress, Timings, silent
from flrc_edge.recipes import Factorization, Recipe
from flrc_edge.settings import Settings
from flrc_edge.texts import token_windows
from flrc_runtime.cache import cache_folder
from flrc_runtime.manifest import RankPlan, Storage

MEASURED = ("measured", "search")  # allocators that need the measured loss of every rank


@dataclass(frozen=True)
class SearchTime:
    """What one way to choose ranks takes.

    Args:
        search: ``asvd`` or the allocator.
        counted: What the seconds hold.
        tokens: Tokens the gradient pass, or every perplexity, is over; 0 where neither is counted.
        seconds: Wall time for one keep.
    """

    search: str
    counted: str
    tokens: int
    seconds: float


class RecipeBench:
    """Holds one calibration, and the factors of one factorization at a time.

    Args:
        loaded: The model; left as it was.
        settings: Calibration and rank step.
        recipes: All that will be asked for. If one compares plans on windows held out of the calibration, they are
            held out for all.
        search: Samples of ASVD's search.
        timings: Filled with the wall time of each phase.
        progress: Called after each unit of work.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        *,
        recipes: Sequence[Recipe],
        search: Search,
        timings: Timings,
        progress: Progress = silent,
    ) -> None:
        hold_out = any(r.allocator == "search" for r in recipes)
        self._settings = replace(
            settings, keep=(1.0,), boundaries=None, allocator="search" if hold_out else "uniform"
        )
        self._loaded, self._recipes, self._search = loaded, recipes, search
        self._timings, self._progress = timings, progress
        self._shapes = {p.name: p.shape for p in loaded.config.projections()}
        self._samples = token_windows(
            loaded.tokenizer,
            settings.texts,
            windows=search.samples,
            length=window_length(loaded, search.window),
            seed=settings.seed,
            vocab_size=loaded.config.vocab_size,
        ).ids
        self._statistics, self.calibration = measure(
            loaded, self._settings, progress=progress, timings=timings
        )
        self._truncations: dict[Storage, list[Truncation]] = {}
        self._resumed: set[Storage] = set()
        self._choosing: dict[
            tuple[str, str], list[float]
        ] = {}  # seconds by allocator and the factors it reads
        self.factors: dict[str, Factors] = {}

    @property
    def moments(self) -> Mapping[str, Moments]:
        """Statistics of every projection."""
        return self._statistics.moments

    def factorize(self, method: Factorization) -> None:
        """Replace ``factors`` by those of a factorization, up to the ranks that its recipes can use."""
        model = self._loaded.model
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in self._shapes}
        self.factors = {}  # the earlier ones take as much memory as the model
        if method == "svd":
            with self._timings.phase("factorize svd"):
                self.factors = {name: svd_factors(w, name=name) for name, w in weights.items()}
        elif method == "asvd":
            with self._timings.phase("channel means"):
                windows = calibration_windows(self._loaded, self._settings).ids
                means = channel_means(model, list(weights), windows, progress=self._progress)
            with self._timings.phase("factorize asvd"):
                self.factors = {
                    name: asvd_factors(w, means[name], alpha=self._search.alpha, name=name)
                    for name, w in weights.items()
                }
        else:
            self.factors = self._fit(method)

    def _fit(self, method: Method) -> dict[str, Factors]:
        recipes = [r for r in self._recipes if r.factorization == method]
        pivoted = any(r.storage == "pivoted" for r in recipes)
        # Where times are compared, losses are measured: reading them from the cache is no way to choose ranks.
        timed = any(r.allocator == "asvd" for r in self._recipes)
        chosen = replace(
            self._settings,
            factorization=method,
            storage="pivoted" if pivoted else "plain",
            reuse_statistics=self._settings.reuse_statistics and not timed,
        )
        with self._timings.phase(f"factorize {method}"):
            factors = factorize_all(
                self._loaded,
                self._statistics.moments,
                method=method,
                storage=chosen.stored,
                progress=self._progress,
            )
        if any(r.allocator in MEASURED for r in recipes):
            with self._timings.phase(f"measure {method}"):
                factors = with_losses(
                    self._loaded, chosen, factors, self.calibration.fingerprint, progress=self._progress
                )
        return factors

    def plan(self, recipe: Recipe, keep: float) -> RankPlan:
        """Choose the ranks of a recipe whose factors are there; ASVD's perplexities are measured once for all keeps."""
        step = self._settings.rank_step
        if recipe.allocator == "asvd":
            found = self._sensitivities(recipe.storage)
            start = perf_counter()
            plan = search_ranks(self._shapes, found, keep, step=step, storage=recipe.storage)
        else:
            chosen = replace(
                self._settings,
                keep=(keep,),
                allocator=recipe.allocator,
                score=recipe.score,
                storage=recipe.storage,
            )
            start = perf_counter()
            plan = plan_ranks(self._shapes, chosen, self._statistics.moments, self.factors)
            if recipe.allocator == "search":
                plan = search_plan(self._loaded, chosen, plan.scores, self.factors, progress=self._progress)
        spent = perf_counter() - start
        reads = "" if recipe.allocator in ("fisher", "uniform", "asvd") else recipe.factorization
        self._choosing.setdefault((recipe.allocator, reads), []).append(spent)
        return plan

    def chunks(self, recipe: Recipe, plan: RankPlan) -> Mapping[str, Sequence[Chunk]]:
        """Return what is stored of a plan, from the factors that are there: corrected if the recipe says so."""
        if not recipe.corrected:
            return stored_chunks(plan, self.factors)
        with self._timings.phase("correct"):
            ids = correction_windows(self._loaded, self._settings)
            return correct(self._loaded, plan, self.factors, ids, progress=self._progress).chunks

    def search_times(self) -> tuple[SearchTime, ...]:
        """Return what choosing ranks took so far; nothing if ASVD's search, the yardstick, was not run."""
        if not self._truncations:
            return ()
        with self._timings.phase("gradient pass over the search's samples"):
            calibrate(
                self._loaded.model,
                list(self._shapes),
                self._samples,
                labels=self._settings.labels,
                progress=self._progress,
            )
        rows = [self._asvd_time(storage) for storage in self._truncations]
        for (allocator, method), spent in self._choosing.items():
            if allocator not in ("asvd", "uniform"):
                rows += self._times(allocator, method, mean(spent))
        return tuple(replace(row, seconds=round(row.seconds, 4)) for row in rows)

    def _asvd_time(self, storage: Storage) -> SearchTime:
        found, seconds = self._truncations[storage], self._timings.seconds
        earlier = "; partly measured by an earlier run" if storage in self._resumed else ""
        return SearchTime(
            "asvd" if storage == "plain" else f"asvd, {storage}",
            f"channel means over all calibration tokens, an SVD a projection, {len(found)} perplexities, the threshold"
            + earlier,
            self._samples.numel(),
            seconds["channel means"]
            + seconds["factorize asvd"]
            + sum(t.seconds for t in found)
            + mean(self._choosing["asvd", ""]),
        )

    def _times(self, allocator: str, method: str, ranks: float) -> list[SearchTime]:
        """Return the rows of one allocator: its ranks alone, and with what they are chosen from."""
        seconds = self._timings.seconds
        name = f"{allocator}, {method}" if method else allocator
        last = "candidate plans compared" if allocator == "search" else "the ranks"
        rows = [SearchTime(name, f"{last} alone, all else given", 0, ranks)]
        work, counted = ranks, last
        if allocator in MEASURED:
            work, counted = work + seconds[f"measure {method}"], f"losses of every rank, {counted}"
        if method:
            work, counted = work + seconds[f"factorize {method}"], f"factors, {counted}"
        passes = []
        if allocator not in MEASURED:
            passes.append(
                ("the search's samples", self._samples.numel(), "gradient pass over the search's samples")
            )
        if not self._settings.reuse_statistics:  # otherwise the time may be that of reading a cache
            passes.append(("all calibration tokens", self.calibration.tokens, "calibrate"))
        elif allocator in MEASURED:
            rows.append(SearchTime(name, f"{counted}, statistics given", 0, work))
        return rows + [
            SearchTime(name, f"gradient pass over {where}, {counted}", tokens, seconds[phase] + work)
            for where, tokens, phase in passes
        ]

    def _sensitivities(self, storage: Storage) -> list[Truncation]:
        if storage not in self._truncations:
            store = SensitivityStore(None)
            if self._settings.reuse_statistics:
                key = f"{self.calibration.fingerprint} {self._search.alpha!r} {storage} {tuple(self._samples.shape)}"
                digest = hashlib.sha256(key.encode() + self._samples.numpy().tobytes()).hexdigest()
                store = SensitivityStore(cache_folder() / "sensitivities" / f"{digest}.json")
            with self._timings.phase("asvd search"):
                self._truncations[storage] = sensitivities(
                    self._loaded,
                    self.factors,
                    self._samples,
                    step=self._settings.rank_step,
                    storage=storage,
                    store=store,
                    progress=self._progress,
                )
            if store.resumed:
                self._resumed.add(storage)
        return self._truncations[storage]
