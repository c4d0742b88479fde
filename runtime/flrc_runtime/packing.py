"""Weights as this machine's kernels read them, made once and mapped by every stage and every process.

onnxruntime packs int8 and int4 weights whenever a session opens, on the heap, for each stage anew. Here each stage is
opened once, onnxruntime saves what it packed, and the stages' files are merged (shared_weights.py) into one that is
mapped from then on: memory of one stage, and opening is reading a graph. What is packed depends on processor and
onnxruntime, so it lives in the user's cache under both and under the bundle's hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .cache import cache_folder
from .errors import FlrcError, UsageError
from .files import resolve_inside
from .graph_file import check_graph_file
from .manifest import KIND_NAMES, Manifest
from .sessions import check_onnxruntime, loading_error
from .shared_weights import PACKED_WEIGHTS, SharedWeights

FORMAT = 1  # of what is in a packed folder
INLINE = 1024  # bytes; smaller tensors stay in the graph
LIMIT = 16 * 10**9  # bytes of all packed bundles together, but for the newest
STALE = 24 * 3600.0  # seconds after which an unfinished folder was left by a run that died
_log = logging.getLogger(__name__)


def packed_root() -> Path:
    """Return the folder of all packed bundles."""
    return cache_folder() / "packed"


def packed_place(manifest: Manifest) -> Path:
    """Return the folder of a bundle's packed weights on this machine, there or not."""
    import onnxruntime

    parts = {
        "format": FORMAT,
        "files": sorted((name, info.sha256) for name, info in manifest.files.items()),
        "stages": [stage.graph for stage in manifest.stages],
        "onnxruntime": onnxruntime.__version__,
        "processor": processor(),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return packed_root() / digest[:32]


def processor() -> str:
    """Return what decides which kernels onnxruntime takes: the architecture and the processor's features."""
    found = [sys.platform, platform.machine()]
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        # x86 has flags, ARM has Features; all cores of a kind are alike, big and small ones differ in "CPU part".
        wanted = ("flags", "Features", "CPU part")
        found += sorted({line for line in lines if line.startswith(wanted)})
    elif sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found.append(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
    else:
        found.append(platform.processor())
    return "\n".join(found)


def find_packed(manifest: Manifest) -> Path | None:
    """Return the folder of a bundle's packed weights if it is there, and note that it was used."""
    place = packed_place(manifest)
    if not (place / PACKED_WEIGHTS).is_file():
        return None
    try:
        os.utime(place)
    except OSError:
        _log.debug("the time of %s could not be changed", place)
    return place


def pack(folder: Path, manifest: Manifest, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Pack the weights of a bundle for this machine, unless they are.

    Safe to call from several processes at once: each works in a folder of its own, and the first that is done wins.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        progress: Called with the stages done and their number.

    Returns:
        The folder with one graph a stage, named as in the bundle, and their weights.

    Raises:
        UsageError: It is a static bundle.
        FlrcError: onnxruntime is too old or does not pack a stage, or the cache cannot be written or has no room.
    """
    if manifest.kind != "bundle":
        raise UsageError(f"{folder.name} is a {KIND_NAMES[manifest.kind]}; only fused graphs are packed")
    check_onnxruntime()
    found = find_packed(manifest)
    if found is not None:
        return found
    place = packed_place(manifest)
    work = place.parent / f".{place.name}.tmp-{os.getpid()}-{time.monotonic_ns()}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(place.parent)
        _check_room(folder, manifest, place.parent)
        work.mkdir()
        with (work / PACKED_WEIGHTS).open("wb") as file:
            shared = SharedWeights(file, PACKED_WEIGHTS)
            if progress is not None:
                progress(0, len(manifest.stages))
            for done, stage in enumerate(manifest.stages, 1):
                graph_file = resolve_inside(folder, stage.graph)
                check_graph_file(graph_file, manifest.weight_sizes())
                own = _saved_by_onnxruntime(graph_file, work)
                graph = shared.move(own, own.with_suffix(".bin"))
                own.unlink()
                own.with_suffix(".bin").unlink()
                with (work / stage.graph).open("wb") as target:
                    target.write(graph)
                    _keep(target)
                if progress is not None:
                    progress(done, len(manifest.stages))
            _keep(file)
        try:
            work.replace(place)
        except OSError:
            if not (place / PACKED_WEIGHTS).is_file():  # else another process was faster
                raise
    except OSError as error:
        raise FlrcError(f"{place.parent} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    evict(keep=place)
    return place


def evict(*, keep: Path, limit: int = LIMIT) -> None:
    """Remove the packed bundles that were not used for longest, until all take at most ``limit`` bytes.

    Args:
        keep: One that stays in any case.
        limit: In bytes.
    """
    entries = [p for p in keep.parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in entries}
    total = sum(sizes.values())
    for entry in sorted(entries, key=lambda p: p.stat().st_mtime):
        if total <= limit:
            return
        if entry != keep:
            # A process that has it mapped keeps it until it ends (Windows refuses: then it stays).
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
            _log.info("removed the packed weights %s, not used for longest", entry.name)


def _keep(file: BinaryIO) -> None:
    """Have what was written reach the disk before the folder gets its name."""
    file.flush()
    os.fsync(file.fileno())


def _clear_stale(root: Path) -> None:
    for path in root.glob(".*.tmp-*"):
        if time.time() - path.stat().st_mtime > STALE:
            shutil.rmtree(path, ignore_errors=True)


def _check_room(folder: Path, manifest: Manifest, root: Path) -> None:
    """Refuse if the disk cannot hold raw and packed bytes of one stage beside those of all."""
    needed = 5 * sum(info.size for name, info in manifest.files.items() if name.endswith(".bin"))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise FlrcError(
            f"{needed / 1e9:.1f} GB are needed to pack {folder.name}, {free / 1e9:.1f} GB are free in {root}"
        )


def _saved_by_onnxruntime(graph: Path, work: Path) -> Path:
    """Open a graph so that onnxruntime writes it with packed weights into ``work``; return the written graph."""
    import onnxruntime

    saved = work / f"{graph.stem}.saved.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(saved)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": saved.with_suffix(".bin").name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise FlrcError(
            f"onnxruntime does not pack {graph.name}: {loading_error(error, graph.parent)}"
        ) from error
    return saved
