"""What a benchmark measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Test = Literal["prompt", "decode"]
ALTERNATING = "alternating"


@dataclass(frozen=True)
class Row:
    """One measured speed.

    Args:
        bundle: Name of the folder, or of the peer and its file.
        stage: Number of the stage, ``schedule``, ``speculative``, or ``alternating``: the first and the last stage in
            turn; empty for a peer.
        keep: Activated share of the projection parameters; None where it varies or is not known.
        test: ``prompt`` reads tokens at once, ``decode`` makes one after another.
        tokens: Tokens of one repetition.
        ms_per_token: Median over the repetitions.
        ms_spread: Largest less smallest.
        tokens_per_second: Of the median.
        gb_per_second: Bytes of weights read a token over its time, 10^9 bytes a second; None where they vary or are
            not known, and for prompts, which read them once for many tokens.
        accepted: Share of the drafts that stage 0 kept; None without drafts.
        ratio: Speed divided by that of the reference: the baseline's stage 0, else the first peer; None without one.
    """

    bundle: str
    stage: str
    keep: float | None
    test: Test
    tokens: int
    ms_per_token: float
    ms_spread: float
    tokens_per_second: float
    gb_per_second: float | None = None
    accepted: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Loading:
    """What opening a bundle costs, each time in a process of its own.

    Args:
        bundle: Name of the folder.
        stages: How many were opened.
        packed: Whether as weights packed for this machine.
        seconds: Median, its files in the page cache.
        cold_seconds: The first time, its files dropped from the page cache; None where the system cannot.
        loaded_bytes: Memory after loading less memory before it: proportional set size (PSS), which counts a page
            shared by processes in parts; None where the system does not tell.
        used_bytes: The same after every opened stage read a prompt and made tokens.
        private_bytes: Of the pages after use those that are no file's and this process alone has.
        file_bytes: Size of the bundle.
        cache_bytes: Size of the packed weights; None if not packed.
    """

    bundle: str
    stages: int
    packed: bool
    seconds: float
    cold_seconds: float | None
    loaded_bytes: int | None
    used_bytes: int | None
    private_bytes: int | None
    file_bytes: int
    cache_bytes: int | None


@dataclass(frozen=True)
class Operators:
    """All operators of a kind in a decode step.

    Args:
        bundle: Name of the folder.
        stage: Number of the stage.
        kind: Such as ``MatMulNBits``.
        count: How many a step.
        ms_per_token: Of all of them together, under onnxruntime's profiler, which slows small ones down.
    """

    bundle: str
    stage: str
    kind: str
    count: float
    ms_per_token: float


@dataclass(frozen=True)
class BenchResult:
    """All rows and their conditions.

    Args:
        rows: Prompts first.
        loading: Empty if it was not asked for.
        operators: Empty if they were not asked for.
        packing_seconds: What making packed weights took, by bundle; those that were there already are missing.
        bandwidth: Bytes a second that as many threads read from memory.
        depth: Tokens in the cache when decoding begins.
        threads: Of one operator; None for onnxruntime's choice.
        repetitions: Of every test.
        machine: Architecture and system.
        versions: Of onnxruntime and of the peers.
    """

    rows: tuple[Row, ...]
    loading: tuple[Loading, ...]
    packing_seconds: dict[str, float]
    bandwidth: float
    depth: int
    threads: int | None
    repetitions: int
    machine: str
    versions: dict[str, str]
    operators: tuple[Operators, ...] = ()


def move_ms(result: BenchResult, bundle: str) -> float | None:
    """Return what moving to another stage costs in ms a move; None for a bundle of one stage.

    The decode time when the first and the last stage take turns, less the mean of the two alone.
    """
    decode = {r.stage: r.ms_per_token for r in result.rows if r.bundle == bundle and r.test == "decode"}
    if ALTERNATING not in decode:
        return None
    last = max(int(stage) for stage in decode if stage.isdigit())
    return decode[ALTERNATING] - (decode["0"] + decode[str(last)]) / 2
