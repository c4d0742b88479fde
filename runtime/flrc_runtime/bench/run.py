"""Prompt and decode speed of every stage and of the schedule, beside a baseline and peers measured in the same run.

Every repetition goes once through all of them, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..bundle import load, open_bundle
from ..engine import Model
from ..errors import UsageError
from ..packing import find_packed
from ..speculative import Speculation
from .bandwidth import memory_bandwidth
from .loading import loading as measure_loading
from .peers import Peer
from .profile import profile
from .result import BenchResult, Loading, Operators, Row, Test
from .subjects import Spent, Subject, bundle_subjects

SETTLE = 0.25  # seconds before each subject: threads of the one before may still spin, llama.cpp's do
Progress = Callable[[str, int, int], None]


def bench(
    bundles: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    peers: Sequence[tuple[str, str | Path]] = (),
    prompt_tokens: Sequence[int] = (64,),
    decode_tokens: int = 64,
    text: str | None = None,
    speculation: Speculation | None = None,
    repetitions: int = 5,
    threads: int | None = None,
    loading: bool = False,
    operators: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure bundles.

    Args:
        bundles: The folders.
        baseline: Another bundle to compare with, for instance the dense model.
        peers: Other programs and what they open (peers.py): ``("genai", folder)``, ``("llama.cpp", file)``.
        prompt_tokens: Tokens of the prompt tests; the decode test starts with the fewest of them in the cache.
        decode_tokens: Tokens of the decode test.
        text: Whose beginning is the prompt, through the tokenizer of the first bundle; None for random tokens.
        speculation: Also measure stage 0 of every bundle of several stages with drafts; needs ``text``, for how many
            are kept depends on what is said.
        repetitions: Of every test, after one that does not count.
        threads: Of one operator; None for each program's choice.
        loading: Also measure time and memory of opening each bundle: all stages, stage 0 alone, and not packed.
        operators: Also say what kinds of operators a decode step of every stage spends its time on.
        progress: Called with what is measured, and the finished and the total number of repetitions.

    Raises:
        UsageError: A number is not positive, the tokens do not fit a context, or the text is too short.
        VerificationError: A folder is not a bundle or is damaged.
        FlrcError: A peer is not there or fails.
    """
    import onnxruntime

    counts = sorted(set(prompt_tokens))
    for name, value in (
        *(("prompt", count) for count in (counts or [0])),
        ("decode", decode_tokens),
        ("repetitions", repetitions),
    ):
        if value < 1:
            raise UsageError(f"{name} {value} is not a positive number")
    if speculation is not None and text is None:
        raise UsageError(
            "how many drafts are kept depends on what is said", hint="name a text to begin with: --text FILE"
        )
    report = progress or _silent
    context = max(counts[0] + decode_tokens, counts[-1]) + 1 + (speculation.most if speculation else 0)
    folders = [Path(folder) for folder in (baseline, *bundles) if folder is not None]
    with ExitStack() as stack:
        # In processes of their own, and before this one maps the same files.
        packing = dict(filter(None, (_packed(folder, context, threads) for folder in folders)))
        found = _loadings(folders, threads, repetitions, report) if loading else ()
        bandwidth = memory_bandwidth(threads)
        models = [load(folder, context=context, threads=threads) for folder in folders]
        if speculation is not None and all(model.num_stages == 1 for model in models):
            raise UsageError(
                f"{folders[-1].name} has one stage, none that could draft", hint="leave out --speculative"
            )
        subjects: list[Subject] = []
        for folder, model in zip(folders, models, strict=True):
            subjects += bundle_subjects(open_bundle(folder), model, speculation=speculation)
        ids = _prompt(models[-len(bundles)], text, counts[-1])
        versions = {"onnxruntime": onnxruntime.__version__}
        for name, path in peers:
            peer = Peer(name, Path(path), threads=threads, context=context)
            stack.callback(peer.close)
            versions[peer.label.bundle] = peer.version
            subjects.append(peer)
        spent = _measured(subjects, ids, counts, decode_tokens, repetitions, report)
        profiled = _profiled(folders, ids[: counts[0]], threads, report) if operators else ()
    reference = 0 if baseline is not None else len(subjects) - len(peers) if peers else None
    return BenchResult(
        rows=_rows(subjects, spent, counts, decode_tokens, reference),
        loading=tuple(found),
        packing_seconds=packing,
        bandwidth=bandwidth,
        depth=counts[0],
        threads=threads,
        repetitions=repetitions,
        machine=f"{platform.machine()} {platform.system()}",
        versions=versions,
        operators=tuple(profiled),
    )


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


def _packed(folder: Path, context: int, threads: int | None) -> tuple[str, float] | None:
    """Pack a bundle as its first load does; return its name and the seconds, or None if it was or cannot be."""
    opened = open_bundle(folder)
    if find_packed(opened.manifest) is not None:
        return None
    started = time.perf_counter()
    load(folder, context=context, threads=threads, stages=())
    seconds = time.perf_counter() - started
    return (folder.resolve().name, seconds) if find_packed(opened.manifest) is not None else None


def _loadings(
    folders: Sequence[Path], threads: int | None, repetitions: int, report: Progress
) -> list[Loading]:
    """Measure every bundle packed and not, and of several stages the first alone."""
    asked: list[tuple[Path, tuple[int, ...] | None, bool]] = []
    for folder in folders:
        opened = open_bundle(folder)
        packs = [True, False] if find_packed(opened.manifest) is not None else [False]
        for pack in packs:
            asked.append((folder, None, pack))
            if len(opened.graphs) > 1:
                asked.append((folder, (0,), pack))
    found = []
    for done, (folder, stages, pack) in enumerate(asked):
        report("Loading", done, len(asked))
        found.append(
            measure_loading(folder, stages=stages, pack=pack, threads=threads, repetitions=repetitions)
        )
    report("Loading", len(asked), len(asked))
    return found


def _profiled(
    folders: Sequence[Path], ids: Sequence[int], threads: int | None, report: Progress
) -> list[Operators]:
    """Profile every stage of every bundle, after everything that is timed."""
    asked = [(folder, stage) for folder in folders for stage in range(len(open_bundle(folder).graphs))]
    found: list[Operators] = []
    for done, (folder, stage) in enumerate(asked):
        report("Profiling", done, len(asked))
        found += profile(folder, stage, ids, threads=threads)
    report("Profiling", len(asked), len(asked))
    return found


def _measured(
    subjects: Sequence[Subject],
    ids: Sequence[int],
    counts: Sequence[int],
    decode_tokens: int,
    repetitions: int,
    report: Progress,
) -> list[dict[int, list[Spent]]]:
    """Return what each subject spent on each length of prompt; it decodes after the shortest."""
    result: list[dict[int, list[Spent]]] = [{count: [] for count in counts} for _ in subjects]
    for repetition in range(repetitions + 1):
        for subject, spent in zip(subjects, result, strict=True):
            time.sleep(SETTLE)
            for count in counts:
                once = subject.measure(ids[:count], decode_tokens if count == counts[0] else 0)
                if repetition:
                    spent[count].append(once)
        report("Measuring", repetition + 1, repetitions + 1)
    return result


def _rows(
    subjects: Sequence[Subject],
    spent: Sequence[Mapping[int, Sequence[Spent]]],
    counts: Sequence[int],
    decode_tokens: int,
    reference: int | None,
) -> tuple[Row, ...]:
    tests: list[tuple[Test, int]] = [*(("prompt", count) for count in counts), ("decode", decode_tokens)]
    rows = []
    for test, tokens in tests:
        times = [
            [
                s.prompt if test == "prompt" else s.decode
                for s in of[tokens if test == "prompt" else counts[0]]
            ]
            for of in spent
        ]
        base = statistics.median(times[reference]) if reference is not None else None
        for subject, seconds, of in zip(subjects, times, spent, strict=True):
            label, median = subject.label, statistics.median(seconds)
            shares = [s.accepted for s in of[counts[0]] if s.accepted is not None]
            decoding = test == "decode"
            read = label.step_bytes if decoding else None
            rows.append(
                Row(
                    bundle=label.bundle,
                    stage=label.stage,
                    keep=label.keep,
                    test=test,
                    tokens=tokens,
                    ms_per_token=median * 1e3 / tokens,
                    ms_spread=(max(seconds) - min(seconds)) * 1e3 / tokens,
                    tokens_per_second=tokens / median,
                    gb_per_second=None if read is None else read * tokens / median / 1e9,
                    accepted=statistics.mean(shares) if shares and decoding else None,
                    ratio=None if base is None else base / median,
                )
            )
    return tuple(rows)
