"""What is measured on the calibration text, or taken from the cache: statistics, losses of ranks and of rounding."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flrc_edge.calibration import Moments, Statistics, calibrate
from flrc_edge.errors import UsageError
from flrc_edge.factorization import DAMPING, Factors
from flrc_edge.input_grams import HEAD, weighted_grams
from flrc_edge.measured import measured_losses
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, Timings, silent
from flrc_edge.rounding_losses import (
    DENSE_FORMATS,
    EMBEDDING_FORMATS,
    FACTOR_FORMATS,
    RoundingLosses,
    embedding_losses,
    rounding_losses,
)
from flrc_edge.settings import Settings
from flrc_edge.statistics_cache import cached_matrices, cached_statistics, cached_tensors
from flrc_edge.texts import Windows, token_windows
from flrc_edge.token_loss import Labels
from flrc_runtime.manifest import Calibration, Storage

GRAM_WINDOWS = 24  # whose inputs say how to round
CORRECTION_WINDOWS = 40  # on which projections are fitted to what the compressed layers before them produce
HEAD_WINDOWS = 4  # that number formats of the head are compared on
MEASURED_WINDOWS = 8  # whose losses are measured at every rank: a curve is an average over all their tokens
STATISTICS = "energy, weighted, gradient, Fisher scores"  # what a cached file holds
_log = logging.getLogger(__name__)


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
            names,
            lambda into, journal: calibrate(
                loaded.model,
                names,
                windows.ids,
                labels=settings.labels,
                into=into,
                journal=journal,
                progress=progress,
            ),
        )
    return statistics, Calibration(windows.sources, windows.ids.numel(), length, settings.seed, fingerprint)


def calibration_windows(loaded: LoadedModel, settings: Settings, *, held_out: bool = False) -> Windows:
    """Return the token windows that statistics are measured on, or those that plans are compared on.

    Only the allocator ``search`` holds windows out: every eighth.
    """
    length = window_length(loaded, settings.window)
    count = settings.tokens // length
    windows = token_windows(
        loaded.tokenizer,
        settings.texts,
        windows=count,
        length=length,
        seed=settings.seed,
        vocab_size=loaded.config.vocab_size,
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
    some = some_windows(ids, MEASURED_WINDOWS)
    parts = (fingerprint, settings.factorization, DAMPING, settings.stored, len(some))
    key = _key(settings, parts)
    losses = cached_tensors(
        "losses",
        key,
        lambda journal: measured_losses(loaded.model, factors, some, journal=journal, progress=progress),
    )
    return {name: replace(f, measured=losses[name]) for name, f in factors.items()}


def input_grams(
    loaded: LoadedModel, settings: Settings, *, progress: Progress = silent
) -> tuple[Mapping[str, torch.Tensor], str]:
    """Measure the second moments of inputs that rounding is judged by, or take them from the cache.

    Returns:
        What :func:`flrc_edge.input_grams.weighted_grams` returns, and its fingerprint.
    """
    ids = some_windows(calibration_windows(loaded, settings).ids, GRAM_WINDOWS)
    names = [p.name for p in loaded.config.projections()]
    fingerprint = _fingerprint(loaded, ids, "sampled")
    grams = cached_matrices(
        "input-moments",
        fingerprint if settings.reuse_statistics else None,
        [*names, HEAD],
        lambda into, journal: weighted_grams(
            loaded.model, names, ids, into=into, journal=journal, progress=progress
        ),
    )
    return grams, fingerprint


def tried_roundings(
    loaded: LoadedModel,
    settings: Settings,
    factors: Mapping[str, Factors],
    moments: Mapping[str, Moments],
    grams: Mapping[str, torch.Tensor],
    *,
    storages: Sequence[Storage],
    fingerprint: str,
    progress: Progress = silent,
) -> tuple[dict[str, RoundingLosses], dict[str, float]]:
    """Try number formats on every projection, and on embedding and head, or take what they cost from the cache.

    Args:
        loaded: The original model.
        settings: The windows, the rank step, and whether to use the cache.
        factors: Of every projection.
        moments: Of every projection.
        grams: From :func:`input_grams`.
        storages: The forms that factors may be stored in.
        fingerprint: Of everything that factors and grams were computed from.
        progress: Called after each unit of work.

    Returns:
        Nats a token, of every projection and of embedding and head by format.
    """
    parts = (fingerprint, settings.factorization, DAMPING, tuple(storages), settings.rank_step)
    formats = (DENSE_FORMATS, FACTOR_FORMATS, EMBEDDING_FORMATS)

    def measure_all(_: Path | None) -> dict[str, torch.Tensor]:
        found = rounding_losses(
            loaded, factors, grams, moments, storages=storages, step=settings.rank_step, progress=progress
        )
        ids = some_windows(calibration_windows(loaded, settings).ids, HEAD_WINDOWS)
        head = embedding_losses(loaded.model, grams[HEAD], ids, progress=progress)
        return {HEAD: torch.tensor([*head.values()]), **{name: r.packed() for name, r in found.items()}}

    found = cached_tensors("rounding", _key(settings, (*parts, formats)), measure_all)
    head = dict(zip(EMBEDDING_FORMATS, found[HEAD].tolist(), strict=True))
    return {name: RoundingLosses.unpacked(found[name], storages) for name in factors}, head


def correction_windows(loaded: LoadedModel, settings: Settings) -> torch.Tensor:
    """Return the windows ``[windows, T]`` that factors are corrected on."""
    return some_windows(calibration_windows(loaded, settings).ids, CORRECTION_WINDOWS)


def some_windows(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` windows spread over all of them."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]


def window_length(loaded: LoadedModel, wanted: int) -> int:
    """Return ``wanted`` tokens, or the model's context if that is shorter."""
    return min(wanted, loaded.config.context_length)


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


def _key(settings: Settings, parts: tuple[object, ...]) -> str | None:
    """Return the name of a cached file, or None if the cache is not to be used."""
    return hashlib.sha256(repr(parts).encode()).hexdigest() if settings.reuse_statistics else None
