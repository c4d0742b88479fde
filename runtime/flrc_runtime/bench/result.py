"""What a benchmark measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Test = Literal["prompt", "decode"]


@dataclass(frozen=True)
class Row:
    """One measured speed.

    Args:
        bundle: Name of the folder, or of the peer and its file.
        stage: Number of the stage, or ``speculative``; empty for a peer.
        keep: Activated share of the projection parameters; None where it varies or is not known.
        test: ``prompt`` reads tokens at once, ``decode`` makes one after another.
        tokens: Of a prompt; of decoding, those in the cache when it begins.
        samples: Turns measured: prompts, steps, or runs of what cannot be stepped.
        ms_per_token: Median over the turns.
        ms_spread: Upper less lower quartile.
        tokens_per_second: Of the median.
        bytes_per_token: Weights that a step reads; None where they vary or are not known, and for prompts, which read
            them once for many tokens.
        gb_per_second: These bytes over the time, 10^9 bytes a second.
        accepted: Share of the drafts that stage 0 kept; None without drafts.
        ratio: Median of the time over that of the first row of the test in the same turn; None of what was measured
            before turns were taken.
        ratio_low: Lower end of its 95 % interval; None of fewer than six turns.
        ratio_high: Upper end.
    """

    bundle: str
    stage: str
    keep: float | None
    test: Test
    tokens: int
    samples: int
    ms_per_token: float
    ms_spread: float
    tokens_per_second: float
    bytes_per_token: int | None = None
    gb_per_second: float | None = None
    accepted: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Move:
    """What moving between the first and the last stage costs more than staying, in ms a move, and its 95 % interval."""

    bundle: str
    ms: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Beside:
    """Decoding while other processes of the same priority keep processors busy.

    Args:
        bundle: As in a row.
        stage: Likewise.
        processes: That are busy.
        ms_alone: Of a token, median over runs of ``decode_tokens``.
        ms_per_token: The same beside them.
        ratio: Median of the second over the first, run by run.
        ratio_low: Lower end of its 95 % interval; None of fewer than six runs.
        ratio_high: Upper end.
    """

    bundle: str
    stage: str
    processes: int
    ms_alone: float
    ms_per_token: float
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True)
class Loading:
    """What opening a bundle costs, each time in a process of its own.

    Args:
        bundle: Name of the folder.
        stages: How many were opened and used.
        first_token_seconds: From the start of the process to the first token behind a prompt of 8, median, the files
            in the page cache.
        cold_seconds: The same once with the bundle's files dropped from the page cache; None where the system cannot.
        open_seconds: Of the first, what opening the bundle takes: manifest, tokenizer and sessions.
        session_seconds: Of that, onnxruntime's sessions.
        loaded_bytes: Memory after opening less memory before it: proportional set size (PSS), which counts a page
            shared by processes in parts; None where the system does not tell.
        used_bytes: The same after an answer of 96 tokens through every opened stage.
        private_bytes: Of the pages after use those that are no file's and this process alone has.
        process_bytes: PSS of the whole process after use: Python and onnxruntime, too.
        cache_bytes: Keys and values of that answer.
        file_bytes: Size of the bundle.
    """

    bundle: str
    stages: int
    first_token_seconds: float
    cold_seconds: float | None
    open_seconds: float
    session_seconds: float
    loaded_bytes: int | None
    used_bytes: int | None
    private_bytes: int | None
    process_bytes: int | None
    cache_bytes: int
    file_bytes: int


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
        rows: Prompts first; the first row of each test is what the others are compared with.
        moves: One for every bundle of several stages.
        beside: Empty if it was not asked for.
        loading: Likewise.
        operators: Likewise.
        bandwidth: Bytes a second that as many threads read from memory.
        decode_tokens: Of one repetition.
        repetitions: Of every test.
        threads: Of one operator; None for each program's choice.
        machine: Architecture and system.
        versions: Of onnxruntime and of the peers.
        isa: Instruction set of our operators; None without their library.
        product_bandwidth: Bytes of weights a second that one large product of ours reads; likewise.
    """

    rows: tuple[Row, ...]
    moves: tuple[Move, ...]
    beside: tuple[Beside, ...]
    loading: tuple[Loading, ...]
    operators: tuple[Operators, ...]
    bandwidth: float
    decode_tokens: int
    repetitions: int
    threads: int | None
    machine: str
    versions: dict[str, str]
    isa: str | None = None
    product_bandwidth: float | None = None
