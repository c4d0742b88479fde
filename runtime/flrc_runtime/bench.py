"""Prompt and decode speed of every stage and of the schedule, beside a baseline measured in the same run.

Every repetition goes once through all of them, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .bundle import load
from .engine import Model
from .errors import UsageError
from .policy import FixedStage, Policy, SchedulePolicy, StepState, prompt_stage

Test = Literal["prompt", "decode"]
ALTERNATING = "alternating"


@dataclass(frozen=True)
class Row:
    """One measured speed.

    Args:
        bundle: Name of the folder.
        stage: Number of the stage, ``schedule``, or ``alternating``: the first and the last stage in turn.
        keep: Activated share of the projection parameters; None where it varies.
        test: ``prompt`` reads tokens at once, ``decode`` makes one after another.
        tokens: Tokens of one repetition.
        ms_per_token: Median over the repetitions.
        ms_spread: Largest less smallest.
        tokens_per_second: Of the median.
        ratio: Speed divided by that of the baseline's stage 0; None without a baseline.
    """

    bundle: str
    stage: str
    keep: float | None
    test: Test
    tokens: int
    ms_per_token: float
    ms_spread: float
    tokens_per_second: float
    ratio: float | None


@dataclass(frozen=True)
class Loading:
    """What opening all stages of a bundle cost; ``resident_bytes`` is None where the system does not tell."""

    bundle: str
    seconds: float
    resident_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class BenchResult:
    """All rows and their conditions."""

    rows: tuple[Row, ...]
    loading: tuple[Loading, ...]
    threads: int | None
    repetitions: int
    machine: str
    onnxruntime: str


@dataclass(frozen=True)
class _Subject:
    """One stage or schedule to measure."""

    bundle: str
    model: Model
    stage: str
    keep: float | None
    policy: Policy


def bench(
    bundle: str | Path,
    *,
    baseline: str | Path | None = None,
    prompt_tokens: int = 64,
    decode_tokens: int = 64,
    repetitions: int = 5,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Measure a bundle.

    Args:
        bundle: The folder.
        baseline: Another bundle to compare with, for instance the dense model.
        prompt_tokens: Tokens of the prompt test, also the cache the decode test starts with.
        decode_tokens: Tokens of the decode test.
        repetitions: Of every test, after one that does not count.
        threads: Of one operator; None for onnxruntime's choice.
        progress: Called with the finished and the total number of repetitions.

    Raises:
        UsageError: A number is not positive, or the tokens do not fit a context.
        VerificationError: A folder is not a bundle or is damaged.
    """
    import onnxruntime

    for name, value in (("prompt", prompt_tokens), ("decode", decode_tokens), ("repetitions", repetitions)):
        if value < 1:
            raise UsageError(f"{name} {value} is not a positive number")
    subjects: list[_Subject] = []
    loading: list[Loading] = []
    for folder in (baseline, bundle):
        if folder is not None:
            loaded, found = _open(Path(folder), prompt_tokens + decode_tokens, threads)
            loading.append(loaded)
            subjects += found
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in subjects]
    for repetition in range(repetitions + 1):
        for subject, (prompt, decode) in zip(subjects, times, strict=True):
            spent = _measure(subject, prompt_tokens, decode_tokens)
            if repetition:
                prompt.append(spent[0])
                decode.append(spent[1])
        if progress is not None:
            progress(repetition, repetitions)
    rows: list[Row] = []
    reference: dict[Test, float] = {}
    for subject, (prompt, decode) in zip(subjects, times, strict=True):
        tests: tuple[tuple[Test, int, list[float]], ...] = (
            ("prompt", prompt_tokens, prompt),
            ("decode", decode_tokens, decode),
        )
        for test, tokens, spent_ms in tests:
            row = _row(subject, test, tokens, spent_ms, reference.get(test))
            if baseline is not None and test not in reference:
                reference[test] = row.tokens_per_second
                row = _row(subject, test, tokens, spent_ms, row.tokens_per_second)
            rows.append(row)
    rows.sort(key=lambda row: row.test, reverse=True)
    return BenchResult(
        tuple(rows),
        tuple(loading),
        threads,
        repetitions,
        f"{platform.machine()} {platform.system()}",
        onnxruntime.__version__,
    )


def move_ms(result: BenchResult, bundle: str) -> float | None:
    """Return what moving to another stage costs in ms a move; None for a bundle of one stage.

    The decode time when the first and the last stage take turns, less the mean of the two alone.
    """
    decode = {r.stage: r.ms_per_token for r in result.rows if r.bundle == bundle and r.test == "decode"}
    if ALTERNATING not in decode:
        return None
    last = max(int(stage) for stage in decode if stage.isdigit())
    return decode[ALTERNATING] - (decode["0"] + decode[str(last)]) / 2


def _open(folder: Path, context: int, threads: int | None) -> tuple[Loading, list[_Subject]]:
    before, started = resident_bytes(), time.perf_counter()
    model = load(folder, context=context, threads=threads)
    seconds, after = time.perf_counter() - started, resident_bytes()
    used = after - before if after is not None and before is not None else None
    manifest, name = model.manifest, folder.resolve().name
    subjects = [
        _Subject(name, model, str(stage), info.keep, FixedStage(stage))
        for stage, info in enumerate(manifest.stages)
    ]
    if model.num_stages > 1:
        subjects.append(_Subject(name, model, "schedule", None, SchedulePolicy(manifest.schedule)))
        # Beside the two stages alone, this is what a move costs.
        last = model.num_stages - 1
        subjects.append(_Subject(name, model, ALTERNATING, None, lambda state: state.generated % 2 * last))
    return Loading(name, seconds, used, sum(f.size for f in manifest.files.values())), subjects


def _measure(subject: _Subject, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    """Return milliseconds per token of the prompt and of decoding; end tokens do not end it."""
    model, policy = subject.model, subject.policy
    ids = np.random.default_rng(0).integers(0, model.manifest.model.vocab_size, prompt_tokens).tolist()
    stage = prompt_stage(policy)
    decoder = model.decoder()
    try:
        started = time.perf_counter()
        logits = decoder.prefill(ids, stage)
        read = time.perf_counter()
        for index in range(1, decode_tokens + 1):
            stage = policy(StepState(index, decoder.length, 0.0, stage))
            logits = decoder.step(int(logits.argmax()), stage)
        ended = time.perf_counter()
    finally:
        decoder.close()
    return (read - started) * 1e3 / prompt_tokens, (ended - read) * 1e3 / decode_tokens


def _row(
    subject: _Subject, test: Test, tokens: int, spent_ms: Sequence[float], reference: float | None
) -> Row:
    median = statistics.median(spent_ms)
    speed = 1e3 / median
    return Row(
        bundle=subject.bundle,
        stage=subject.stage,
        keep=subject.keep,
        test=test,
        tokens=tokens,
        ms_per_token=median,
        ms_spread=max(spent_ms) - min(spent_ms),
        tokens_per_second=speed,
        ratio=speed / reference if reference else None,
    )


def resident_bytes() -> int | None:
    """Return the resident memory of this process in bytes, or None where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return int(line.split()[1]) * 1024 if line else None
