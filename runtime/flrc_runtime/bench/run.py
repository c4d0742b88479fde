"""Prompt and decode speed of every stage of bundles and of peers, paired: turns.py; and what else was asked for."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from .. import kernels
from ..bundle import load, open_bundle
from ..engine import Model
from ..errors import FlrcError, UsageError
from ..speculative import Speculation
from .bandwidth import memory_bandwidth
from .loading import loading as measure_loading
from .paired import median, ratios
from .peers import open_peer
from .product import product_bandwidth
from .profile import profile
from .result import BenchResult, Beside, Loading, Move, Operators, Row, Test
from .subjects import ROOM, Subject, bundle_subjects
from .turns import Report, Times, decode_beside, decode_in_turn, moves, read_in_turn

Progress = Callable[[str, int, int], None]
Named = tuple[str, str | Path]  # a peer and what it opens


def bench(
    bundles: Sequence[str | Path],
    *,
    baseline: str | Path | Named | None = None,
    peers: Sequence[Named] = (),
    prompt_tokens: Sequence[int] = (64,),
    contexts: Sequence[int] = (64,),
    decode_tokens: int = 32,
    text: str | None = None,
    speculation: Speculation | None = None,
    repetitions: int = 8,
    threads: int | None = None,
    loading: bool = False,
    operators: bool = False,
    busy: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure bundles and peers, in turn.

    Args:
        bundles: The folders.
        baseline: What all are compared with: another bundle, for instance the dense model, or a peer; None for the
            first bundle. Of a bundle it is stage 0.
        peers: Other programs and what they open (peers.py): ``("genai", folder)``, ``("llama.cpp", file)``.
        prompt_tokens: Tokens of the prompt tests.
        contexts: Tokens in the cache when decoding begins, a test each.
        decode_tokens: Tokens of one repetition of a decode test.
        text: Whose beginning is the prompt, through the tokenizer of the first bundle; None for random tokens.
        speculation: Also measure stage 0 of every bundle of several stages with drafts; needs ``text``, for how many
            are kept depends on what is said.
        repetitions: Of every test.
        threads: Of one operator; None for each program's choice.
        loading: Also measure the first token and memory of each bundle, all stages and stage 0 alone.
        operators: Also say what kinds of operators a decode step of every stage spends its time on.
        busy: Also decode beside so many processes of the same priority that keep processors busy.
        progress: Called with what is measured, and the finished and the total number of repetitions.

    Raises:
        UsageError: A number is not positive, the tokens do not fit a context, or the text is too short.
        VerificationError: A folder is not a bundle or is damaged.
        FlrcError: A peer is not there or fails.
    """
    import onnxruntime

    prompts, depths = sorted(set(prompt_tokens)), sorted(set(contexts))
    for name, values in (
        ("prompt", prompts),
        ("context", depths or [0]),
        ("decode", [decode_tokens]),
        ("repetitions", [repetitions]),
    ):
        if values and min(values) < 1:
            raise UsageError(f"{name} {min(values)} is not a positive number")
    if busy < 0:
        raise UsageError(f"busy {busy} is not a number of processes")
    if speculation is not None and text is None:
        raise UsageError(
            "how many drafts are kept depends on what is said", hint="name a text to begin with: --text FILE"
        )
    report = progress or _silent

    def of(what: str) -> Report:
        return lambda done, total: report(what, done, total)

    surplus = speculation.most if speculation else 0  # a round may end beyond what was asked
    context = max([*prompts, depths[-1] + decode_tokens]) + ROOM + surplus
    first_peer = baseline if isinstance(baseline, tuple) else None
    folders = [Path(folder) for folder in bundles]
    if baseline is not None and not isinstance(baseline, tuple):
        folders.insert(0, Path(baseline))
    with ExitStack() as stack:
        # In processes of their own, before this one maps the same files.
        found = _loadings(folders, threads, repetitions, of("Loading")) if loading else []
        bandwidth, isa, streamed = memory_bandwidth(threads), None, None
        if _has_operators():
            isa, streamed = kernels.isa(), product_bandwidth(threads)
        models = [load(folder, context=context, threads=threads) for folder in folders]
        if speculation is not None and all(model.num_stages == 1 for model in models):
            raise UsageError(
                f"{folders[-1].name} has one stage, none that could draft", hint="leave out --speculative"
            )
        ids = _prompt(models[-len(bundles)], text, max([*prompts, depths[-1]]))
        versions = {"onnxruntime": onnxruntime.__version__}
        subjects: list[Subject] = []
        for folder, model in zip(folders, models, strict=True):
            subjects += bundle_subjects(open_bundle(folder), model, speculation=speculation)
        for named in filter(None, (first_peer, *peers)):
            opened = open_peer(named[0], Path(named[1]), threads=threads)
            for peer in opened:
                stack.callback(peer.close)
                versions[peer.label.bundle] = peer.version
            subjects[:0] = opened if named is first_peer else []
            subjects += [] if named is first_peer else opened
        rows: list[Row] = []
        for count in prompts:
            readers = [subject for subject in subjects if subject.reads]
            times = read_in_turn(readers, ids[:count], repetitions, of(f"Reading {count} tokens"))
            rows += _rows("prompt", count, readers, times)
        for depth in depths:
            times = decode_in_turn(
                subjects, ids[:depth], decode_tokens, repetitions, of(f"Decoding behind {depth} tokens")
            )
            rows += _rows("decode", depth, subjects, times)
        start, steps = ids[: depths[0]], decode_tokens * repetitions
        moved = [
            _move(folder, moves(model, start, steps))
            for folder, model in zip(folders, models, strict=True)
            if model.num_stages > 1
        ]
        beside: list[Beside] = []
        if busy:
            what = of(f"Decoding beside {busy} busy processes")
            times = decode_beside(subjects, start, decode_tokens, repetitions, busy, what)
            beside = [_beside(s, t, busy) for s, t in zip(subjects, times, strict=True)]
        profiled = _profiled(folders, start, threads, of("Profiling")) if operators else []
    return BenchResult(
        rows=tuple(rows),
        moves=tuple(moved),
        beside=tuple(beside),
        loading=tuple(found),
        operators=tuple(profiled),
        bandwidth=bandwidth,
        decode_tokens=decode_tokens,
        repetitions=repetitions,
        threads=threads,
        machine=f"{platform.machine()} {platform.system()}",
        versions=versions,
        isa=isa,
        product_bandwidth=streamed,
    )


def _has_operators() -> bool:
    """Return whether the operator library is there; bundles of stock operators do without."""
    try:
        kernels.library()
    except FlrcError:
        return False
    return True


def _prompt(model: Model, text: str | None, count: int) -> list[int]:
    """Return the first tokens of a text, or random ones."""
    if text is None:
        vocab_size = model.manifest.model.vocab_size
        random: list[int] = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
        return random
    ids = model.tokenizer.encode(text)[:count]
    if len(ids) < count:
        raise UsageError(f"the text has {len(ids)} tokens, {count} are asked for")
    return ids


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def _loadings(
    folders: Sequence[Path], threads: int | None, repetitions: int, report: Report
) -> list[Loading]:
    """Measure every bundle, and of several stages the first alone."""
    asked: list[tuple[Path, tuple[int, ...] | None]] = []
    for folder in folders:
        several = len(open_bundle(folder).graphs) > 1
        asked += [(folder, None), (folder, (0,))] if several else [(folder, None)]
    found = []
    for done, (folder, stages) in enumerate(asked, start=1):
        found.append(measure_loading(folder, stages=stages, threads=threads, repetitions=repetitions))
        report(done, len(asked))
    return found


def _profiled(
    folders: Sequence[Path], ids: Sequence[int], threads: int | None, report: Report
) -> list[Operators]:
    """Profile every stage of every bundle, after everything that is timed."""
    asked = [(folder, stage) for folder in folders for stage in range(len(open_bundle(folder).graphs))]
    found: list[Operators] = []
    for done, (folder, stage) in enumerate(asked, start=1):
        found += profile(folder, stage, ids, threads=threads)
        report(done, len(asked))
    return found


def _rows(test: Test, tokens: int, subjects: Sequence[Subject], times: Sequence[Times]) -> list[Row]:
    rows = []
    for subject, seconds in zip(subjects, times, strict=True):
        label, middle = subject.label, statistics.median(seconds.own)
        ratio = ratios(seconds.own, seconds.other)
        lower, upper = np.quantile(seconds.own, (0.25, 0.75))
        read = label.step_bytes if test == "decode" else None
        rows.append(
            Row(
                bundle=label.bundle,
                stage=label.stage,
                keep=label.keep,
                test=test,
                tokens=tokens,
                samples=len(seconds.own),
                ms_per_token=middle * 1e3,
                ms_spread=float(upper - lower) * 1e3,
                tokens_per_second=1 / middle,
                bytes_per_token=read,
                gb_per_second=None if read is None else read / middle / 1e9,
                accepted=subject.accepted if test == "decode" else None,
                ratio=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
            )
        )
    return rows


def _move(folder: Path, seconds: Sequence[float]) -> Move:
    ms = median(1e3 * second for second in seconds)
    return Move(folder.resolve().name, ms.value, ms.low, ms.high)


def _beside(subject: Subject, times: Times, processes: int) -> Beside:
    ratio = ratios(times.own, times.other)
    return Beside(
        bundle=subject.label.bundle,
        stage=subject.label.stage,
        processes=processes,
        ms_alone=statistics.median(times.other) * 1e3,
        ms_per_token=statistics.median(times.own) * 1e3,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
    )
