"""What ``compress`` really takes, each run in a process and with a cache of its own, beside what was estimated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flrc_edge.compress_cost import compress_cost
from flrc_edge.compress_trial import Trial
from flrc_edge.errors import FlrcError
from flrc_edge.machine import machine
from flrc_edge.models import decoder_of, resolve_model
from flrc_edge.progress import Progress, silent
from flrc_runtime.cache import ENVIRONMENT, cache_folder
from flrc_runtime.files import read_json

KEEP = 0.8
WINDOW = 1024


@dataclass(frozen=True)
class CostPoint:
    """One run of ``compress``.

    Args:
        model: Its name.
        parameters: Of the model.
        tokens: Of the calibration.
        seconds: Wall time of each phase.
        peak_bytes: Largest resident memory of the process.
        expected_seconds: As estimated just before.
        expected_bytes: As estimated.
    """

    model: str
    parameters: int
    tokens: int
    seconds: Mapping[str, float]
    peak_bytes: int
    expected_seconds: float
    expected_bytes: int


@dataclass(frozen=True)
class Cost:
    """Runs of one or several models.

    Args:
        keep: Of every run; plain factors in floats, the default allocator.
        window: Tokens of a calibration window.
        points: In the order they were run.
        machine: That they ran on.
    """

    keep: float
    window: int
    points: tuple[CostPoint, ...]
    machine: str


def measure_cost(models: Sequence[str], tokens: Sequence[int], *, progress: Progress = silent) -> Cost:
    """Compress every model on every number of tokens.

    Args:
        models: Folders or built-in names.
        tokens: Of the calibrations.
        progress: Called after each run.

    Raises:
        FlrcError: A run fails.
    """
    points: list[CostPoint] = []
    total = len(models) * len(tokens)
    progress("compress", 0, total)
    for name in models:
        source = resolve_model(name)
        for count in tokens:
            config, window = decoder_of(source.config), min(WINDOW, source.config.context_length)
            expected = compress_cost(
                config,
                tokens=count,
                window=window,
                storage="plain",
                integers=False,
                trial=Trial.of(config, window=window, storage="plain"),
            )
            seconds, peak = _run(source.location, count)
            points.append(
                CostPoint(
                    source.name,
                    source.config.parameters(),
                    count,
                    seconds,
                    peak,
                    round(expected.seconds, 1),
                    expected.memory_bytes,
                )
            )
            progress("compress", len(points), total)
    return Cost(KEEP, WINDOW, tuple(points), machine())


def with_earlier(path: Path, key: str, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with the points of other models, or tokens, that a file holds of the same kind of machine.

    Args:
        path: The JSON file; may be missing.
        key: Of the result in it.
        new: A :class:`Cost` as a dictionary.
    """
    earlier = (read_json(path) if path.exists() else {}).get("cost", {}).get(key, {})
    points = {(p["model"], p["tokens"]): p for p in new["points"]}
    if all(earlier.get(name) == new[name] for name in ("keep", "window", "machine")):
        points = {(p["model"], p["tokens"]): p for p in earlier["points"]} | points
    return {**new, "points": sorted(points.values(), key=lambda p: (p["parameters"], p["tokens"]))}


def _run(model: str, tokens: int) -> tuple[dict[str, float], int]:
    """Return the seconds of each phase and the peak memory (bytes) of one run."""
    place = cache_folder()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".cost-") as folder:
        arguments = ["--keep", f"{KEEP:g}", "--tokens", str(tokens), "--window", str(WINDOW)]
        arguments += ["--storage", "plain", "--json"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "flrc_edge",
                "-q",
                "compress",
                model,
                "-o",
                f"{folder}/checkpoint",
                *arguments,
            ],
            env=os.environ | {ENVIRONMENT: f"{folder}/cache"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise FlrcError(f"compress on {tokens} tokens failed: {said[-1] if said else ''}")
        report = json.loads(done.stdout)
        seconds = {name: round(value, 2) for name, value in report["seconds"].items()}
        return seconds, int(report["peak_bytes"])
