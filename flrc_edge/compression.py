"""The offline way: model -> statistics -> factors -> ranks -> schedule -> checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from flrc_edge import __version__, allocation, checkpoint, schedule
from flrc_edge.bit_allocation import Formats, check_sizes
from flrc_edge.calibration import is_main_process
from flrc_edge.chunks import Chunk
from flrc_edge.correction import correct
from flrc_edge.divergence import dense_log_probs
from flrc_edge.factorization import Factors
from flrc_edge.input_grams import HEAD
from flrc_edge.integers import quantize_head, quantize_model, with_formats
from flrc_edge.loss_curves import loss_curves
from flrc_edge.measurements import correction_windows, input_grams, measure, with_losses
from flrc_edge.models import LoadedModel, open_model
from flrc_edge.peak_memory import peak_memory, warn_if_scarce
from flrc_edge.placement import placed, stored_chunks
from flrc_edge.planning import factorize_all, plan_ranks, plan_sizes, search_plan
from flrc_edge.portable_model import check_portable
from flrc_edge.progress import Progress, Timings, silent
from flrc_edge.quantization import QuantizedMatrix
from flrc_edge.settings import Settings
from flrc_edge.validation import Validation
from flrc_exporters.architectures import DecoderConfig, ModelShapes
from flrc_runtime.manifest import Manifest, ModelInfo, RankPlan, Schedule
from flrc_runtime.output_folder import check_output_folder, check_room, claimed


def compress(
    model: str | LoadedModel,
    output: str | Path,
    settings: Settings | None = None,
    *,
    portable: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    timings: Timings | None = None,
) -> Manifest | None:
    """Compress a model into a checkpoint.

    Args:
        model: What :func:`flrc_edge.open_model` takes or gives. A loaded one is left as it was.
        output: Folder to write; appears whole or not at all.
        settings: How to compress.
        portable: Also take families outside the capability table (``--graph optimum``).
        overwrite: Replace a checkpoint that is there.
        progress: Called after each unit of work.
        timings: Filled with the wall time of each phase.

    Returns:
        The manifest, or None in a process of ``accelerate launch`` that only helped to calibrate.

    Raises:
        FlrcError: Anything a user can mend; nothing is written then.
    """
    target = Path(output)
    check_output_folder(target, overwrite=overwrite)
    with claimed(target) if is_main_process() else nullcontext():
        return _compress(
            model,
            target,
            settings or Settings(),
            portable=portable,
            overwrite=overwrite,
            progress=progress,
            timings=timings or Timings(),
        )


def _compress(
    model: str | LoadedModel,
    target: Path,
    settings: Settings,
    *,
    portable: bool,
    overwrite: bool,
    progress: Progress,
    timings: Timings,
) -> Manifest | None:
    with timings.phase("load"):
        if isinstance(model, str):
            progress("load", 0, 1)
            loaded = open_model(model, portable=portable)
            progress("load", 1, 1)
        else:
            loaded = model
    if not isinstance(loaded.config, DecoderConfig):
        check_portable(loaded, settings)
    else:
        rounds = settings.dtype != "float"
        warn_if_scarce(
            peak_memory(loaded.config, window=settings.window, storage=settings.stored, integers=rounds)
        )
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    info = model_info(loaded.name, loaded.config)  # refuses early what no manifest could say
    check_room(target, _size_at_most(loaded, settings))
    if settings.sizes:
        formats = Formats.of(settings.dtype, settings.head)
        check_sizes(
            loaded.decoder, settings.sizes, formats, storages=settings.storages, step=settings.rank_step
        )
    else:
        allocation.check_feasible(
            shapes.values(), settings.keep, step=settings.rank_step, storage=settings.stored
        )
    calibration, statistics, factors = None, None, dict[str, Factors]()
    if settings.sizes or settings.keep != (1.0,):
        statistics, calibration = measure(loaded, settings, progress=progress, timings=timings)
        if not is_main_process():
            return None
        with timings.phase("factorize"):
            factors = factorize_all(
                loaded,
                statistics.moments,
                method=settings.factorization,
                storage=settings.stored,
                progress=progress,
            )
        if settings.allocator in ("measured", "search"):
            with timings.phase("measure"):
                factors = with_losses(loaded, settings, factors, calibration.fingerprint, progress=progress)
    grams: Mapping[str, Tensor] = {}
    inputs = ""
    if settings.dtype != "float":
        with timings.phase("input moments"):
            grams, inputs = input_grams(loaded, settings, progress=progress)
    with timings.phase("allocate"):
        if settings.sizes and statistics is not None and calibration is not None:
            fingerprint = f"{calibration.fingerprint} {inputs}"
            plan = plan_sizes(
                loaded,
                settings,
                statistics.moments,
                factors,
                grams,
                fingerprint=fingerprint,
                progress=progress,
            )
        else:
            plan = plan_ranks(shapes, settings, statistics.moments if statistics else None, factors)
    if settings.allocator == "search" and factors:
        with timings.phase("select"):
            plan = search_plan(loaded, settings, plan.scores, factors, progress=progress)
    if settings.dtype not in ("float", "mixed") and not settings.sizes:
        plan = with_formats(plan, settings.dtype, head=settings.head, hidden_size=loaded.config.hidden_size)
    integers: dict[str, QuantizedMatrix] = {}
    if settings.correct:
        with timings.phase("correct"):
            ids = correction_windows(loaded, settings)
            found = correct(loaded, plan, factors, ids, grams=grams or None, progress=progress)
            chunks, integers = found.chunks, found.integers
    else:
        with timings.phase("store"):
            chunks = stored_chunks(plan, factors, progress=progress)
    curves = loss_curves(factors) if factors else None
    factors.clear()  # they take as much memory as the projections
    with timings.phase("schedule"):
        boundaries = _schedule(loaded, plan, chunks, settings, progress)
    if settings.dtype != "float":
        with timings.phase("quantize"):
            if settings.correct:
                integers |= quantize_head(loaded.model, plan, grams[HEAD])
            else:
                integers = quantize_model(loaded.model, plan, chunks, grams, progress=progress)
    dtype: str = settings.dtype
    if dtype == "float":
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
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
            target,
            content,
            source=loaded,
            factors=chunks,
            integers=integers,
            curves=curves,
            overwrite=overwrite,
        )


def _size_at_most(loaded: LoadedModel, settings: Settings) -> int:
    """Return the bytes that a checkpoint takes, a little less for stored integers than this says."""
    if settings.sizes:
        return max(settings.sizes)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    dropped = (1 - max(settings.keep)) * sum(m * n for m, n in (p.shape for p in loaded.config.projections()))
    return round((parameters - dropped) * (4 if settings.dtype == "float" else 0.6))


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


def model_info(name: str, config: ModelShapes) -> ModelInfo:
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


def _versions() -> dict[str, str]:
    found = {"flrc-edge": __version__}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pragma: no cover
            continue
    return found
