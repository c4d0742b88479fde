"""Run a bundle on the arm64 library that is inside the APK, under qemu, and compare it with this machine's onnxruntime.

The library is Android's, as is that of the operators; a small C library of ours stands in for bionic's (native_check/).
Bundles of our own operators have to give the same bytes. Tokens are given, never chosen: onnxruntime's integer kernels
differ between the two instruction sets, and a free answer of a stock bundle may part at any token.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from debian import unpacked
from fetch_tools import AAR_FILE, fetch, tools_folder, without_versions
from numpy.typing import NDArray

import flrc_runtime
from kernels import build as kernels_build

CHECK = Path(__file__).parents[1] / "native_check"
CORES = ("cortex-a53", "cortex-a76", "max")
TOKENS = 24
TEXT = (
    "The lighthouse keeper climbed the stairs every evening before sunset. She cleaned the glass, lit the lamp and "
    "wrote the weather into her book: wind from the west, a calm sea, two fishing boats on their way home."
)
QEMU_PACKAGE, QEMU_SUITES, QEMU_PATH = "qemu-user", ("trixie",), "usr/bin/qemu-aarch64"
QEMU_VERSION = (9, 0)  # older ones end in a fault as soon as onnxruntime asks which processor this is
COMPILER_PACKAGES = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross"
COMPILER, ROOT = "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu"
EMPTY = ("m", "dl", "log", "android")  # bionic's other libraries


def installed_qemu() -> Path | None:
    """Return a qemu that runs onnxruntime: this machine's, or the one in the user's cache."""
    own, kept = shutil.which("qemu-aarch64"), _kept_qemu()
    if own is not None and _version(Path(own)) >= QEMU_VERSION:
        return Path(own)
    return kept if kept.is_file() else None


def qemu() -> Path:
    """Return a qemu that runs onnxruntime; where there is none, one of a later Debian goes to the user's cache."""
    if (installed := installed_qemu()) is not None:
        return installed
    kept = _kept_qemu()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        found = unpacked(QEMU_PACKAGE, QEMU_SUITES, Path(scratch)) / QEMU_PATH
        found.resolve().rename(kept)
    return kept


def build(folder: Path) -> None:
    """Put the programs, the library and what it needs of Android into a folder.

    Raises:
        SystemExit: The compiler is missing or fails.
    """
    if shutil.which(COMPILER) is None:
        sys.exit(f"{COMPILER} is missing: apt-get install {COMPILER_PACKAGES}")
    with zipfile.ZipFile(fetch() / AAR_FILE) as aar:
        for name in aar.namelist():
            if name.startswith("headers/"):
                (folder / Path(name).name).write_bytes(aar.read(name))
        library = aar.read("jni/arm64-v8a/libonnxruntime.so")
    (folder / "libonnxruntime.so").write_bytes(without_versions(library))
    flags = ["-O1", "-fno-builtin", "-w"]
    _compile([*flags, "-shared", "-fPIC", CHECK / "shim.c", "-o", folder / "libc.so", "-Wl,-soname,libc.so"])
    for name in EMPTY:
        empty = folder / "empty.c"
        empty.write_text("")
        _compile(["-shared", "-fPIC", empty, "-o", folder / f"lib{name}.so", f"-Wl,-soname,lib{name}.so"])
    keep = "-Wl,--no-as-needed"  # glibc's mathematics, which the library looks for in the process
    for name in ("run", "operators"):
        _compile(
            ["-O1", "-Wall", "-I", folder, CHECK / f"{name}.c", "-o", folder / name, keep, "-lm", "-ldl"]
        )


def build_kernels(folder: Path) -> Path:
    """Return the operator library of the APK, built in a folder.

    Raises:
        SystemExit: It cannot be built.
    """
    try:
        return kernels_build.build(folder, "android-arm64")
    except kernels_build.BuildError as error:
        sys.exit(str(error))


def emulated(
    emulator: Path,
    built: Path,
    bundle: Path,
    ids: Sequence[int],
    stages: Sequence[int],
    core: str,
    *,
    prompt: int = 1,
    kernels: Path | None = None,
    isa: str = "",
) -> NDArray[np.float32]:
    """Return the logits of every token on one emulated processor, ``[tokens, vocab]``.

    Args:
        emulator: qemu.
        built: What `build` put together.
        bundle: The bundle.
        ids: What is fed.
        stages: Through which stage each token goes.
        core: The processor.
        prompt: So many first tokens are fed at once, through the stage of the first.
        kernels: The operator library, for a bundle of our own operators.
        isa: What FLRC_EDGE_ISA is there.

    Raises:
        SystemExit: The program fails.
    """
    loaded = flrc_runtime.load(bundle, threads=1)
    manifest, cache = loaded.manifest, loaded.sessions.kv_shape
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits"
        command = [
            *(*_under_android(emulator, built, core), "-E", f"FLRC_EDGE_ISA={isa}"),
            *(built / "run", built / "libonnxruntime.so", kernels or "-", out),
            *(cache.layers, cache.heads, cache.width, cache.positions, manifest.model.vocab_size, prompt),
            *(bundle / stage.graph for stage in manifest.stages),
        ]
        given = "".join(f"{i} {s}\n" for i, s in zip(ids, stages, strict=True))
        done = subprocess.run(
            [str(c) for c in command], input=given, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            sys.exit(f"{core}: the program ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return np.fromfile(out, "<f4").reshape(len(ids), -1)


def operators(
    emulator: Path,
    built: Path,
    kernels: Path,
    *,
    core: str = "max",
    isa: str = "",
    graph: Path | None = None,
    x: NDArray[np.float32] | None = None,
) -> tuple[str, bytes]:
    """Register an operator library (runtime/kernels) with the emulated onnxruntime; perhaps run a graph of it.

    Args:
        emulator: qemu.
        built: What `build` put together.
        kernels: The library, of Android or of Linux on arm64.
        core: The processor.
        isa: What FLRC_EDGE_ISA is there.
        graph: A graph of one input.
        x: Its input.

    Returns:
        The instruction set in use and the library's version, and the bytes of all outputs of the graph.

    Raises:
        SystemExit: The program fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "outputs"
        out.touch()
        command: list[object] = [*_under_android(emulator, built, core), "-E", f"FLRC_EDGE_ISA={isa}"]
        command += [built / "operators", built / "libonnxruntime.so", kernels]
        given = b""
        if graph is not None and x is not None:
            command += [graph, out, *x.shape]
            given = x.astype("<f4").tobytes()
        done = subprocess.run([str(c) for c in command], input=given, capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            sys.exit(f"{core}: the program ended with {done.returncode}: {said}")
        return done.stdout.decode().strip(), out.read_bytes()


def _under_android(emulator: Path, built: Path, core: str) -> list[object]:
    return [
        *(emulator, "-cpu", core, "-L", ROOT),
        *("-E", f"LD_LIBRARY_PATH={built}", "-E", f"LD_PRELOAD={built / 'libc.so'}"),
    ]


def compare(bundle: Path, exact: Path | None = None) -> list[dict[str, Any]]:
    """Return, for every processor, how far its logits are from this machine's, and how often both prefer one token.

    With the bundle's twin of accuracy level 0, how far both are from this machine's exact logits, too: at level 4
    each instruction set rounds activations to int8 in its own way.
    """
    emulator = qemu()
    model = flrc_runtime.load(bundle, threads=1)
    ids = model.tokenizer.encode(TEXT)[:TOKENS]
    count = len(model.manifest.stages)
    stages = [i * count // TOKENS for i in range(TOKENS // 2)]
    stages += np.random.default_rng(0).integers(0, count, TOKENS - len(stages)).tolist()
    here = _logits(bundle, ids, stages)
    truth = None if exact is None else _logits(exact, ids, stages)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        kernels = build_kernels(Path(scratch)) if model.manifest.operators else None
        for core in CORES:
            there = emulated(emulator, Path(scratch), bundle, ids, stages, core, kernels=kernels)
            line: dict[str, Any] = {
                "core": core,
                **_distance(there, here),
                "equal": bool((there == here).all()),
            }
            if truth is not None:
                line["to_exact"] = _distance(there, truth)
            found.append(line | {"tokens": len(ids), "moves": int((np.diff(stages) != 0).sum())})
    if truth is not None:
        found.append({"core": "this machine", "to_exact": _distance(here, truth)})
    return found


def _logits(bundle: Path, ids: Sequence[int], stages: Sequence[int]) -> NDArray[np.float32]:
    decoder = flrc_runtime.load(bundle, threads=1, context=len(ids) + 1).decoder()
    return np.stack([decoder.step(i, s).copy() for i, s in zip(ids, stages, strict=True)])


def _distance(logits: NDArray[np.float32], wanted: NDArray[np.float32]) -> dict[str, float]:
    return {
        "relative_l2": float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)),
        "same_best_token": float((logits.argmax(1) == wanted.argmax(1)).mean()),
    }


def _kept_qemu() -> Path:
    return tools_folder().parent / "qemu-aarch64"


def _version(program: Path) -> tuple[int, ...]:
    text = subprocess.run([str(program), "--version"], capture_output=True, text=True).stdout
    numbers = re.search(r"version (\d+)\.(\d+)", text)
    return tuple(map(int, numbers.groups())) if numbers else (0,)


def _compile(arguments: list[object]) -> None:
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{COMPILER} failed:\n{done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--exact", type=Path, help="the same checkpoint, exported with --accuracy-level 0")
    given = parser.parse_args()
    for line in compare(given.bundle, given.exact):
        print(json.dumps(line))
