"""What this machine has and lacks for running, and making, bundles. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from .cache import ENVIRONMENT, cache_folder
from .errors import FlrcError

Level = Literal["ok", "warning", "problem"]
LEAST_PYTHON = (3, 11)
# Instructions that onnxruntime's int4 and int8 products use, the better ones first, by what /proc/cpuinfo calls them.
INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp", "asimd")
FAST = {"amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"}
PROCESSORS = Path("/sys/devices/system/cpu")
LEAST_FREE = 2_000_000_000  # bytes: statistics of a small model


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: ``problem``: something will not work; ``warning``: it will be slow, or only a part works.
        topic: What was looked at.
        text: What was found.
        remedy: What to do about it; empty if nothing.
    """

    level: Level
    topic: str
    text: str
    remedy: str = ""


def diagnose(bundle: Path | None = None) -> Iterator[Finding]:
    """Yield what is found, one thing after the other.

    Args:
        bundle: Is opened, and answers with each of its stages, if it is given.
    """
    yield _python()
    yield from _packages()
    yield _cores()
    yield _instructions()
    yield _memory()
    yield _cache()
    yield from _providers()
    yield _kernels()
    if bundle is not None:
        yield from _bundle(bundle)


def usable_cores() -> int:
    """Return the processors this process may use: those it is bound to, fewer if a control group allows less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        return max(1, min(bound, int(quota) // int(period)))
    return bound


def memory_bytes() -> tuple[int, int] | None:
    """Return the memory of this machine (or of its control group) and what is free of it; None if it is not told."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    if "MemTotal" not in fields or "MemAvailable" not in fields:
        return None
    total, free = 1024 * int(fields["MemTotal"]), 1024 * int(fields["MemAvailable"])
    limit = _memory_limit()
    if limit is not None and limit < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = limit
        free = min(free, total - int(used)) if used.isdecimal() else min(free, total)
    return total, free


def _memory_limit() -> int | None:
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return int(limit) if limit.isdecimal() else None


def _python() -> Finding:
    text = f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if tuple(map(int, platform.python_version_tuple()[:2])) < LEAST_PYTHON:
        return Finding("problem", "python", text, "install Python 3.11 or newer")
    return Finding("ok", "python", text)


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what this project asks for, by extra."""
    wanted: dict[str, list[str]] = {}
    try:
        lines = requires("flrc-edge") or []
        own = version("flrc-edge")
    except PackageNotFoundError:
        yield Finding(
            "warning",
            "flrc-edge",
            "not installed, run from its sources",
            "pip install -e '.[all]' in its folder",
        )
        return
    yield Finding("ok", "flrc-edge", own)
    for line in lines:
        only_for = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        named = re.match(r"[\w.-]+", line)
        if named and named[0] != "flrc-edge":
            wanted.setdefault(only_for[1] if only_for else "", []).append(named[0])
    for extra, packages in wanted.items():
        if extra in ("all", "dev"):  # made of the others
            continue
        found, missing = {}, []
        for package in packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                missing.append(package)
        text = ", ".join(f"{name} {number}" for name, number in found.items())
        if missing:
            text = f"{text}; missing: {', '.join(missing)}" if text else f"missing: {', '.join(missing)}"
        topic = f"extra {extra}" if extra else "packages"
        if not missing:
            yield Finding("ok", topic, text)
        elif extra:
            yield Finding("warning", topic, text, f"pip install 'flrc-edge[{extra}]' if you need it")
        else:
            yield Finding("problem", topic, text, "pip install flrc-edge")


def _cores() -> Finding:
    usable, all_, cores = usable_cores(), os.cpu_count() or 1, _physical_cores()
    of = f" ({cores} physical {'core' if cores == 1 else 'cores'})" if cores else ""
    text = f"{usable} of {all_} processors{of} may be used"
    if usable < 2:
        return Finding("warning", "processors", text, "decoding gains from a second one")
    return Finding("ok", "processors", text)


def _physical_cores() -> int:
    """Return how many cores the machine's processors are of, 0 if it is not told."""
    places = PROCESSORS.glob("cpu[0-9]*/topology/core_cpus_list")
    return len({siblings for place in places if (siblings := _read(str(place)).strip())})


def _instructions() -> Finding:
    flags = set(re.findall(r"[\w.]+", _read("/proc/cpuinfo")))
    found = [name for name in INSTRUCTIONS if name in flags]
    if not flags:
        return Finding("ok", "instructions", f"{platform.machine()}; this system does not tell more")
    if FAST & set(found):
        return Finding("ok", "instructions", ", ".join(found))
    return Finding(
        "warning",
        "instructions",
        ", ".join(found) or "none that are known",
        "integer products will be slow here",
    )


def _memory() -> Finding:
    found = memory_bytes()
    if found is None:
        return Finding("ok", "memory", "this system does not tell")
    total, free = found
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if _memory_limit() == total:
        text += ", all that the control group allows"
    if free < 1e9:
        return Finding(
            "warning", "memory", text, "flrc-edge estimate says what a model needs; end other programs"
        )
    return Finding("ok", "memory", text)


def _cache() -> Finding:
    remedy = f"set {ENVIRONMENT} to a folder that can be written"
    try:
        folder = cache_folder()
    except FlrcError as error:
        return Finding("problem", "cache", str(error), remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"flrc-edge")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("problem", "cache", f"{folder} cannot be written: {error.strerror or error}", remedy)
    text = f"{folder} can be written, {free / 1e9:.1f} GB free"
    if free < LEAST_FREE:
        return Finding("warning", "cache", text, "free some room, or " + remedy)
    return Finding("ok", "cache", text)


def _providers() -> Iterator[Finding]:
    try:
        import onnxruntime

        from .sessions import check_onnxruntime

        check_onnxruntime()
    except ImportError as error:
        yield Finding("problem", "onnxruntime", f"cannot be imported: {error}", "pip install flrc-edge")
        return
    except FlrcError as error:
        yield Finding("problem", "onnxruntime", str(error), error.hint or "")
        return
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers())
    yield Finding("ok", "onnxruntime", f"{onnxruntime.__version__}, providers {providers}")


def _kernels() -> Finding:
    """Look for the operator library, and whether this onnxruntime takes it."""
    from . import kernels

    topic = "kernels"
    try:
        name, path = kernels.isa(), kernels.library()
        with suppress(ImportError):  # that onnxruntime is not there is said already
            import onnxruntime

            kernels.register(onnxruntime.SessionOptions())
    except FlrcError as error:
        return Finding("problem", topic, str(error), error.hint or "")
    forced = os.environ.get(kernels.ENVIRONMENT)
    text = f"{name}, version {kernels.VERSION}, {path}"
    if forced:
        return Finding("ok", topic, f"{text} ({kernels.ENVIRONMENT} asks for it)")
    if name == "portable":
        return Finding("warning", topic, text, "no faster instructions are known of this processor")
    return Finding("ok", topic, text)


def _bundle(folder: Path) -> Iterator[Finding]:
    topic = f"bundle {folder.name}"
    try:
        from .bundle import load
        from .policy import FixedStage

        model = load(folder, context=None)
        speeds = []
        for stage in range(model.num_stages):
            tokens = list(model.stream([0] * 4, max_tokens=8, policy=FixedStage(stage)))
            speeds.append(f"stage {stage} {tokens[-1].decode_tokens_per_second:.0f} tok/s")
    except FlrcError as error:
        yield Finding("problem", topic, str(error), error.hint or "flrc-edge verify says more")
        return
    except ImportError as error:
        yield Finding("problem", topic, f"cannot be tried: {error}", "pip install flrc-edge")
        return
    yield Finding(
        "ok", topic, f"every stage answers: {', '.join(speeds)} (a few tokens; flrc-edge bench measures)"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
