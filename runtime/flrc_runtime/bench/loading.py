"""Time and memory of opening a bundle, in a fresh process each time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..bundle import open_bundle
from ..errors import FlrcError
from ..packing import find_packed
from .result import Loading

PROMPT = 32  # tokens that every opened stage reads, then as many steps
_ROLLUP = Path("/proc/self/smaps_rollup")


def loading(
    folder: Path, *, stages: Sequence[int] | None, pack: bool, threads: int | None, repetitions: int
) -> Loading:
    """Measure one way of opening a bundle.

    Args:
        folder: The bundle, its packed weights made already if ``pack``.
        stages: To open; None for all.
        pack: Open packed weights.
        threads: Of one operator; None for onnxruntime's choice.
        repetitions: Of loading with files in the page cache; the median counts.

    Raises:
        FlrcError: The process ended with an error.
    """
    bundle = open_bundle(folder)
    wanted = list(range(len(bundle.graphs)) if stages is None else stages)
    packed = find_packed(bundle.manifest) if pack else None
    files = [p for place in (bundle.folder, packed) if place is not None for p in place.iterdir()]
    cold = None
    if _dropped(files):
        cold = float(_run(folder, wanted, pack, threads)["seconds"])
    found = [_run(folder, wanted, pack, threads) for _ in range(repetitions)]

    def median(key: str) -> int | None:
        values = [row[key] for row in found if row[key] is not None]
        return int(statistics.median(values)) if values else None

    return Loading(
        bundle=folder.resolve().name,
        stages=len(wanted),
        packed=pack,
        seconds=statistics.median(row["seconds"] for row in found),
        cold_seconds=cold,
        loaded_bytes=median("loaded"),
        used_bytes=median("used"),
        private_bytes=median("private"),
        file_bytes=sum(f.size for f in bundle.manifest.files.values()),
        cache_bytes=None if packed is None else sum(p.stat().st_size for p in packed.iterdir()),
    )


def _dropped(files: Sequence[Path]) -> bool:
    """Drop files from the page cache; return whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _run(folder: Path, stages: Sequence[int], pack: bool, threads: int | None) -> dict[str, float]:
    arguments = json.dumps({"folder": str(folder), "stages": stages, "pack": pack, "threads": threads})
    # Not -m: the package imports this module, which would then be there twice.
    program = "import sys; from flrc_runtime.bench.loading import main; main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise FlrcError(f"{folder} could not be opened in a process of its own: {said[-1] if said else ''}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measured(
    folder: str, *, stages: Sequence[int], pack: bool, threads: int | None
) -> dict[str, float | None]:
    """Open a bundle in this process and use every opened stage; seconds and bytes."""
    import numpy
    import onnxruntime  # noqa: F401 - before the clock starts

    from ..bundle import load

    before = _memory()
    started = time.perf_counter()
    model = load(folder, stages=stages, pack=pack, threads=threads)
    seconds = time.perf_counter() - started
    after = _memory()
    ids = numpy.random.default_rng(0).integers(0, model.manifest.model.vocab_size, PROMPT).tolist()
    for stage in stages:
        decoder = model.decoder()
        logits = decoder.prefill(ids, stage)
        for _ in range(PROMPT):
            logits = decoder.step(int(logits.argmax()), stage)
        decoder.close()
    used = _memory()

    def grown(now: dict[str, int], key: str) -> int | None:
        return now[key] - before[key] if key in now else None

    return {
        "seconds": seconds,
        "loaded": grown(after, "Pss"),
        "used": grown(used, "Pss"),
        "private": grown(used, "Pss_Anon"),
    }


def _memory() -> dict[str, int]:
    """Return this process's memory by kind in bytes; nothing where /proc does not tell."""
    try:
        lines = _ROLLUP.read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def main(arguments: str) -> None:
    """Measure what a JSON object asks for, and print it."""
    asked = json.loads(arguments)
    print(json.dumps(measured(asked.pop("folder"), **asked)))
