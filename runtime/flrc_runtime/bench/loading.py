"""Time to the first token and memory of a bundle, in a fresh process each time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle, open_bundle
from ..errors import FlrcError
from .result import Loading

_PROGRAM = Path(__file__).with_name("opening.py")


@dataclass(frozen=True)
class _Opened:
    """What one process took: seconds from its start to the first token, and what it said itself."""

    first_token: float
    said: dict[str, float]


def loading(folder: Path, *, stages: Sequence[int] | None, threads: int | None, repetitions: int) -> Loading:
    """Measure opening a bundle.

    Args:
        folder: The bundle.
        stages: To open and use; None for all.
        threads: Of one operator; None for onnxruntime's choice.
        repetitions: With files in the page cache, of times and of memory each; the median counts.

    Raises:
        FlrcError: The process ended with an error.
    """
    bundle = open_bundle(folder)
    wanted = list(range(len(bundle.graphs)) if stages is None else stages)
    _opened(bundle, wanted, threads)  # what only a first time costs is not what is asked
    cold = _opened(bundle, wanted, threads).first_token if _dropped(list(bundle.folder.iterdir())) else None
    # Memory is looked at in other processes: looking takes milliseconds.
    timed = [_opened(bundle, wanted, threads) for _ in range(repetitions)]
    weighed = [_opened(bundle, wanted, threads, memory=True).said for _ in range(repetitions)]

    def weight(key: str) -> int | None:
        return int(statistics.median(said[key] for said in weighed)) if key in weighed[0] else None

    return Loading(
        bundle=bundle.folder.resolve().name,
        stages=len(wanted),
        first_token_seconds=statistics.median(one.first_token for one in timed),
        cold_seconds=cold,
        open_seconds=statistics.median(one.said["open"] for one in timed),
        session_seconds=statistics.median(one.said["sessions"] for one in timed),
        loaded_bytes=weight("loaded"),
        used_bytes=weight("used"),
        private_bytes=weight("private"),
        process_bytes=weight("process"),
        cache_bytes=int(weighed[0]["cache"]),
        file_bytes=sum(f.size for f in bundle.manifest.files.values()),
    )


def _dropped(files: Sequence[Path]) -> bool:
    """Drop files from the page cache; return whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _opened(bundle: Bundle, stages: Sequence[int], threads: int | None, *, memory: bool = False) -> _Opened:
    question = {"folder": str(bundle.folder), "stages": stages, "threads": threads, "memory": memory}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", str(_PROGRAM), json.dumps(question)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()  # appears with the first token
    seconds = time.perf_counter() - started
    rest, errors = process.communicate()
    if process.returncode:
        said = errors.strip().splitlines()
        raise FlrcError(
            f"{bundle.folder} could not be opened in a process of its own: {said[-1] if said else ''}"
        )
    return _Opened(seconds, {**json.loads(first), **json.loads(rest)})
