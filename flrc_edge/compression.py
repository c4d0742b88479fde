"""The offline way: model -> statistics -> factors -> ranks -> schedule -> checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch

from flrc_edge import __version__, allocation, checkpoint, schedule, selection
from flrc_edge.allocation import Allocator, Score
from flrc_edge.calibration import Labels, Moments, Statistics, calibrate, is_main_process
from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.correction import fit_corrected
from flrc_edge.divergence import dense_log_probs
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Factors, Method, factorize
from flrc_edge.input_grams import weighted_grams
from flrc_edge.integers import quantize_model, with_formats
from flrc_edge.lowrank import low_rank_layer, replace_linear
from flrc_edge.measured import measured_losses
from flrc_edge.models import LoadedModel, open_model
from flrc_edge.progress import Progress, silent
from flrc_edge.quantization import QuantizedMatrix
from flrc_edge.statistics_cache import cached_losses, cached_statistics
from flrc_edge.texts import WeightedText, Windows, token_windows
from flrc_edge.validation import Validation
from flrc_exporters.architectures import DecoderConfig
from flrc_exporters.number_format import Dtype, NumberFormat
from flrc_runtime.files import check_output_folder
from flrc_runtime.manifest import (
    Calibration,
    Manifest,
    ModelInfo,
    ProjectionPlan,
    RankPlan,
    Schedule,
    Storage,
)

# A mixture: factors fitted to one kind of text alone fail on others. With half of it chat, KL to SmolLM2-135M's own
# answers falls from 0.31 to 0.15 at keep .9, against no chat at all.
DEFAULT_TEXTS = (WeightedText("chat", 0.5), WeightedText("wikitext2", 0.25), WeightedText("austen", 0.25))
MEASURED_WINDOWS = 8  # whose losses are measured at every rank: a curve is an average over all their tokens
STATISTICS = "energy, weighted, gradient, Fisher scores"  # what a cached file holds
GRAM_WINDOWS = 24  # whose inputs say how to round
EXPORT_CONTEXT = 4096  # positions an export has by default; its module would import onnx
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Args:
        keep: Share of projection parameters of each stage, in (0, 1], falling; the first is what is stored.
        allocator: ``measured``, ``search``, ``spectrum``, ``fisher`` or ``uniform``.
        score: Fisher score of the allocator ``fisher``.
        factorization: ``two-sided`` (gradient-aware) or ``one-sided`` (activation-aware).
        labels: What the gradients of the statistics predict: tokens ``sampled`` from the model, or the ``text``.
        correct: Fit factors on the inputs that the compressed layers before them produce (correction.py).
        dtype: ``float`` keeps the model's dtype; ``int8`` and ``int4`` round with compensation (quantization.py).
        head: Number format of embedding and head of a checkpoint of integers.
        storage: ``pivoted`` (r rows and the others as their combinations) or ``plain`` (two factors).
        texts: Calibration texts and their weights.
        tokens: Calibration tokens; at least 16 a feature of the widest input are advised.
        window: Tokens a calibration window; the model's context if that is shorter.
        seed: Chooses the windows.
        rank_step: Ranks are multiples of it.
        boundaries: Token counts at which decoding moves on; None measures them.
        reuse_statistics: Take statistics of the same fingerprint from the cache, and put new ones there.
    """

    keep: tuple[float, ...] = (0.95, 0.9, 0.85)
    allocator: Allocator = "measured"
    score: Score = "gw2"
    factorization: Method = "two-sided"
    labels: Labels = "sampled"
    correct: bool = False
    dtype: Literal["float", "int8", "int4"] = "float"
    head: Literal["int8", "int4"] = "int8"
    storage: Storage = "plain"
    texts: tuple[WeightedText, ...] = DEFAULT_TEXTS
    tokens: int = 32 * 1024
    window: int = 1024
    seed: int = 0
    rank_step: int = allocation.RANK_STEP
    boundaries: tuple[int, ...] | None = None
    reuse_statistics: bool = True

    def __post_init__(self) -> None:
        allocation.check_keep(self.keep)
        kinds = {
            "allocator": Allocator,
            "score": Score,
            "factorization": Method,
            "labels": Labels,
            "storage": Storage,
            "dtype": Literal["float", "int8", "int4"],
            "head": Literal["int8", "int4"],
        }
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for name, least in (("tokens", 2), ("window", 2), ("rank_step", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.texts:
            raise UsageError("name at least one calibration text")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {self.seed}")
        if self.tokens < self.window:
            raise UsageError(f"{self.tokens} calibration tokens do not fill one window of {self.window}")
        if self.boundaries is not None:
            if len(self.boundaries) != len(self.keep) - 1:
                raise UsageError(f"{len(self.keep)} stages need {len(self.keep) - 1} boundaries")
            if any(b < 1 for b in self.boundaries) or list(self.boundaries) != sorted(self.boundaries):
                raise UsageError("boundaries must be at least 1 and must not fall")


@dataclass
class Timings:
    """Wall time in seconds of each phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def compress(
    model: str | LoadedModel,
    output: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    timings: Timings | None = None,
) -> Manifest | None:
    """Compress a model into a checkpoint.

    Args:
        model: What :func:`flrc_edge.open_model` takes or gives. A loaded one is left as it was.
        output: Folder to write; appears whole or not at all.
        settings: How to compress.
        overwrite: Replace a checkpoint that is there.
        progress: Called after each unit of work.
        timings: Filled with the wall time of each phase.

    Returns:
        The manifest, or None in a process of ``accelerate launch`` that only helped to calibrate.

    Raises:
        FlrcError: Anything a user can mend; nothing is written then.
    """
    settings, timings = settings or Settings(), timings or Timings()
    target = Path(output)
    check_output_folder(target, overwrite=overwrite)
    with timings.phase("load"):
        loaded = open_model(model) if isinstance(model, str) else model
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    info = model_info(loaded.name, loaded.config)  # refuses early what no manifest could say
    allocation.check_feasible(
        shapes.values(), settings.keep, step=settings.rank_step, storage=settings.storage
    )
    calibration, statistics, factors = None, None, dict[str, Factors]()
    if settings.keep != (1.0,):
        statistics, calibration = measure(loaded, settings, progress=progress, timings=timings)
        if not is_main_process():
            return None
        with timings.phase("factorize"):
            factors = factorize_all(
                loaded,
                statistics.moments,
                method=settings.factorization,
                storage=settings.storage,
                progress=progress,
            )
        if settings.allocator in ("measured", "search"):
            with timings.phase("measure"):
                factors = with_losses(loaded, settings, factors, calibration.fingerprint, progress=progress)
    with timings.phase("allocate"):
        plan = plan_ranks(shapes, settings, statistics.moments if statistics else None, factors)
    if settings.allocator == "search" and factors:
        with timings.phase("select"):
            plan = search_plan(loaded, settings, plan.scores, factors, progress=progress)
    with timings.phase("correct" if settings.correct else "store"):
        if settings.correct and statistics is not None:
            chunks = fit_corrected(
                loaded,
                plan,
                statistics.moments,
                calibration_windows(loaded, settings),
                method=settings.factorization,
                progress=progress,
            )
        else:
            chunks = stored_chunks(plan, factors)
    with timings.phase("schedule"):
        boundaries = _schedule(loaded, plan, chunks, settings, progress)
    integers: dict[str, QuantizedMatrix] = {}
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    if settings.dtype != "float":
        dtype, plan = settings.dtype, with_formats(plan, settings.dtype, head=settings.head)
        ids = _some(calibration_windows(loaded, settings).ids, GRAM_WINDOWS)
        with timings.phase("input moments"):
            grams = weighted_grams(loaded.model, list(shapes), ids, progress=progress)
        with timings.phase("quantize"):
            integers = quantize_model(loaded, plan, chunks, grams, progress=progress)
    content = Manifest(
        kind="checkpoint",
        model=info,
        plan=plan,
        schedule=boundaries,
        dtype=dtype,
        factorization=settings.factorization,
        calibration=calibration,
        versions=_versions(),
    )
    with timings.phase("write"):
        return checkpoint.write(
            target, content, source=loaded, factors=chunks, integers=integers, overwrite=overwrite
        )


def measure(
    loaded: LoadedModel, settings: Settings, *, progress: Progress = silent, timings: Timings | None = None
) -> tuple[Statistics, Calibration]:
    """Measure the statistics of every projection, or take them from the cache."""
    timings = timings or Timings()
    length = window_length(loaded, settings.window)
    with timings.phase("tokenize"):
        windows = calibration_windows(loaded, settings)
    names = [p.name for p in loaded.config.projections()]
    widest = max(p.shape[1] for p in loaded.config.projections())
    if windows.ids.numel() < 16 * widest:
        _log.warning(
            "%d calibration tokens are few for inputs of %d features; %d or more are advised",
            windows.ids.numel(),
            widest,
            16 * widest,
        )
    fingerprint = _fingerprint(loaded, windows.ids, settings.labels)
    with timings.phase("calibrate"):
        statistics = cached_statistics(
            fingerprint if settings.reuse_statistics else None,
            lambda: calibrate(loaded.model, names, windows.ids, labels=settings.labels, progress=progress),
        )
    # A cached file has them by name; the order of the model decides the order, and the ties, of the plan.
    statistics = replace(statistics, moments={name: statistics.moments[name] for name in names})
    return statistics, Calibration(windows.sources, windows.ids.numel(), length, settings.seed, fingerprint)


def calibration_windows(loaded: LoadedModel, settings: Settings, *, held_out: bool = False) -> Windows:
    """Return the token windows that statistics are measured on, or those that plans are compared on.

    Only the allocator ``search`` holds windows out: every eighth.
    """
    length = window_length(loaded, settings.window)
    count = settings.tokens // length
    windows = token_windows(
        loaded.tokenizer, settings.texts, windows=count, length=length, seed=settings.seed
    )
    if settings.allocator != "search":
        return windows
    if count < 2:
        raise UsageError(
            "the allocator search needs two calibration windows, one to calibrate on and one to compare plans on",
            hint="give more --tokens or a shorter --window",
        )
    every = torch.arange(count) % 8 == min(7, count - 1)
    return replace(windows, ids=windows.ids[every if held_out else ~every])


def with_losses(
    loaded: LoadedModel,
    settings: Settings,
    factors: Mapping[str, Factors],
    fingerprint: str,
    *,
    progress: Progress = silent,
) -> dict[str, Factors]:
    """Measure the loss of every rank on a part of the calibration windows, or take it from the cache.

    Args:
        loaded: The original model.
        settings: The windows, and whether to use the cache.
        factors: Of every projection.
        fingerprint: Of the statistics behind the factors.
        progress: Called after each window.
    """
    ids = calibration_windows(loaded, settings).ids
    some = _some(ids, MEASURED_WINDOWS)
    parts = (fingerprint, settings.factorization, settings.storage, len(some))
    key = hashlib.sha256(repr(parts).encode()).hexdigest() if settings.reuse_statistics else None
    losses = cached_losses(key, lambda: measured_losses(loaded.model, factors, some, progress=progress))
    return {name: replace(f, measured=losses[name]) for name, f in factors.items()}


def _some(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` windows spread over all of them."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]


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
        storage=settings.storage,
        scores=scores,
    )
    return selection.select(
        loaded.model,
        plans,
        calibration_windows(loaded, settings, held_out=True).ids,
        lambda plan: compressed(loaded, plan, factors),
        progress=progress,
    )


def window_length(loaded: LoadedModel, wanted: int) -> int:
    """Return ``wanted`` tokens, or the model's context if that is shorter."""
    return min(wanted, loaded.config.context_length)


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
    step, storage = settings.rank_step, settings.storage
    if settings.allocator == "uniform":
        curves = allocation.uniform_curves(shapes, step=step, storage=storage)
    elif settings.allocator == "fisher":
        curves = allocation.fisher_curves(shapes, moments, score=settings.score, step=step, storage=storage)
    elif settings.allocator in ("measured", "search"):  # which search then compares with others
        curves = allocation.measured_curves(factors, step=step, storage=storage)
    else:
        curves = allocation.spectrum_curves(factors, step=step, storage=storage)
    return allocation.allocate(curves, settings.keep, allocator=settings.allocator, scores=scores)


def stored_chunks(plan: RankPlan, factors: Mapping[str, Factors]) -> dict[str, tuple[Chunk, ...]]:
    """Cut and, where the plan says so, pivot the factors of every factored projection."""
    return {
        p.name: chunks_of(factors[p.name].U, factors[p.name].V, p) for p in plan.projections if not p.dense
    }


@contextmanager
def compressed(
    loaded: LoadedModel, plan: RankPlan, factors: Mapping[str, Factors]
) -> Iterator[torch.nn.Module]:
    """Put a plan's low-rank layers into the loaded model while the block runs."""
    with placed(loaded, plan, stored_chunks(plan, factors)) as model:
        yield model


@contextmanager
def placed(
    loaded: LoadedModel, plan: RankPlan, chunks: Mapping[str, Sequence[Chunk]]
) -> Iterator[torch.nn.Module]:
    """Put chunks into the loaded model while the block runs."""
    replaced = {}
    try:
        for p in plan.projections:
            ranks = tuple(r for r in p.ranks if r is not None)
            if ranks:
                linear = loaded.model.get_submodule(p.name)
                assert isinstance(linear, torch.nn.Linear)
                layer = low_rank_layer(linear, chunks[p.name], ranks=ranks)
                replaced[p.name] = replace_linear(loaded.model, p.name, layer)
        yield loaded.model
    finally:
        for name, linear in replaced.items():
            parent, _, child = name.rpartition(".")
            setattr(loaded.model.get_submodule(parent), child, linear)


def _schedule(
    loaded: LoadedModel,
    plan: RankPlan,
    chunks: Mapping[str, Sequence[Chunk]],
    settings: Settings,
    progress: Progress,
) -> Schedule:
    if plan.num_stages == 1 or settings.boundaries is not None:
        return Schedule(settings.boundaries or ())
    context = loaded.config.context_length
    reference = schedule.reference_answers(loaded.model, loaded.tokenizer, context=context, progress=progress)
    dense = dense_log_probs(loaded.model, reference)
    kept = [plan.kept(s) for s in range(plan.num_stages)]
    with placed(loaded, plan, chunks) as model:
        planned = schedule.plan_schedule(model, reference, dense, kept=kept, end=context, progress=progress)
    return replace(planned.schedule, validation=_facts(planned.validation))


def _facts(validation: Validation | None) -> dict[str, float]:
    if validation is None:
        return {}
    return {
        "schedule_kl": validation.schedule.kl,
        "constant_kl": validation.constant.kl,
        "reversed_kl": validation.reversed.kl,
        "share": validation.schedule.share,
        "gain": validation.gain,
        "gain_error": validation.gain_error,
        "answers": float(validation.answers),
        "tokens": float(validation.tokens),
    }


def model_info(name: str, config: DecoderConfig) -> ModelInfo:
    """Return the facts of a model that its checkpoints and bundles carry."""
    return ModelInfo(
        name=name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        context_length=config.context_length,
        eos_token_ids=config.eos_token_ids,
        parameters=config.parameters(),
    )


def _fingerprint(loaded: LoadedModel, ids: torch.Tensor, labels: Labels) -> str:
    """Hash what the statistics depend on: configuration, weights, token windows and labels."""
    digest = hashlib.sha256(json.dumps(dict(loaded.hf_config), sort_keys=True, default=str).encode())
    digest.update(f"{STATISTICS} {labels}".encode())
    digest.update(ids.numpy().tobytes())
    digest.update(str(tuple(ids.shape)).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"flrc-edge": __version__}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pragma: no cover
            continue
    return found


def keep_for_size(config: DecoderConfig, target_bytes: int, *, dtype: Dtype) -> float:
    """Return the keep whose exported weights take ``target_bytes``, 1 if the dense model takes no more.

    Args:
        config: The decoder.
        target_bytes: Size of the bundle's weight file in bytes.
        dtype: Number format of the export: fp32, int8 or int4.

    Raises:
        UsageError: Even the embedding and the norms are larger.
    """
    projections = sum(m * n for m, n in (p.shape for p in config.projections()))
    rate = NumberFormat.named(dtype).bytes_per_parameter
    others = config.other_tensors().values()
    vectors = sum(shape[0] for shape in others if len(shape) == 1)
    # Cosines and sines of half a head each, for every position and kind of rotary embedding.
    rotary = (
        len({layer.rope for layer in config.layers})
        * config.head_dim
        * min(config.context_length, EXPORT_CONTEXT)
    )
    fixed = sum(prod(shape) for shape in others if len(shape) == 2) * rate + 4 * (vectors + rotary)
    keep = (target_bytes - fixed) / (projections * rate)
    if keep <= 0:
        raise UsageError(
            f"the embedding alone takes {fixed / 1e6:.0f} MB as {dtype}, more than {target_bytes / 1e6:.0f} MB",
            hint="ask for a larger size or a smaller number format",
        )
    return min(keep, 1.0)
