"""The kernels as a library of this machine, compiled once."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels import build

SOURCES = Path(__file__).parents[2] / "runtime" / "kernels"
sys.path.insert(0, str(SOURCES.parents[1] / "android_demo" / "tools"))
import arm64_check  # noqa: E402
import fetch_tools  # noqa: E402

# In the user's own cache, before tests get one of their own.
EMULATOR, ARCHIVE = arm64_check.installed_qemu(), fetch_tools.tools_folder() / fetch_tools.AAR_FILE
# Set by test_sanitizers.py, whose process has the sanitizers' libraries loaded.
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZED = os.environ.get("FLRC_EDGE_SANITIZE") == "1"


VECTORS = {"avx_vnni": "avx2"}  # instruction sets whose floats are another's


class Plane(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("groups", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class Inputs(ctypes.Structure):
    _fields_ = (
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("tokens", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("floats", ctypes.c_void_p),
    )


class Prologue(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("columns", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("gelu", ctypes.c_bool),
    )


class Prepared(ctypes.Structure):
    _fields_ = (
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("floats", ctypes.c_void_p),
    )


def aligned(size: int, dtype: Any = np.uint8) -> Any:
    """Return zeros whose memory begins at a multiple of 64 bytes, as a file's mapped pages do."""
    count = size * np.dtype(dtype).itemsize
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype)


class Kernels:
    """The library, called with arrays."""

    def __init__(self, path: Path, isas: list[str]) -> None:
        self.library = ctypes.CDLL(str(path))
        self.isas = isas

    def prepare(
        self, isa: str, x: Any, *, gelu: bool = False, epsilon: float = 1e-5, **given: Any
    ) -> tuple[Any, Any, Any, Any, Any, bool]:
        """Return int8 ``[tokens, inputs]``, scales and sums ``[tokens, blocks]``, floats, the sum, if all was finite.

        ``given``: gate and residual like x, post_norm and norm ``[columns]``.
        """
        tokens, columns = x.shape
        blocks = -(-columns // 32)
        q, floats = np.zeros((tokens, 32 * blocks), np.int8), np.zeros((tokens, 32 * blocks), np.float32)
        scales, sums = np.zeros((tokens, blocks), np.float32), np.zeros((tokens, blocks), np.int32)
        added = np.zeros_like(x)
        function, finite = getattr(self.library, f"flrc_prepare_{VECTORS.get(isa, isa)}"), True
        function.restype = ctypes.c_bool
        for t in range(tokens):
            rows = {name: (a[t] if a.ndim == 2 else a).ctypes.data for name, a in given.items()}
            prologue = Prologue(
                x=x[t].ctypes.data,
                sum=added[t].ctypes.data,
                columns=columns,
                epsilon=epsilon,
                gelu=gelu,
                **rows,
            )
            out = Prepared(*(a[t].ctypes.data for a in (q, scales, sums, floats)))
            finite &= function(ctypes.byref(prologue), 0, blocks, ctypes.byref(out))
        return q, scales, sums, floats, added, finite

    def quantize(self, x: Any) -> tuple[Any, Any, Any, bool]:
        """Return int8 ``[tokens, inputs]``, scales and sums ``[tokens, blocks]``, and whether all was finite."""
        q, scales, sums, _, _, finite = self.prepare("portable", x)
        return q, scales, sums, finite

    def floats(
        self, isa: str, data: Any, rows: int, x: Any, *, cut: int | None = None, onto: Any = None
    ) -> Any:
        """Return y ``[tokens, rows filled up]`` of a plane of floats, perhaps cut in two."""
        groups, blocks = -(-rows // 16), x.shape[1] // 32
        y = np.zeros((len(x), groups * 16), np.float32) if onto is None else onto.copy()
        plane = Plane(data.ctypes.data, groups, blocks, 32, 1.0)
        given = Inputs(None, None, None, len(x), blocks, blocks, x.ctypes.data)
        function: Callable[..., None] = getattr(self.library, f"flrc_floats_{VECTORS.get(isa, isa)}")
        for first, last in [(0, groups)] if cut is None else [(cut, groups), (0, cut)]:
            function(
                ctypes.byref(plane), ctypes.byref(given), first, last, y.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_ssize_t(groups * 16), ctypes.c_bool(onto is not None),
            )  # fmt: skip
        return y

    def product(
        self,
        isa: str,
        data: Any,
        shape: tuple[int, int, int, float],
        x: tuple[Any, Any, Any],
        *,
        blocks: int | None = None,
        cut: int | None = None,
        onto: Any = None,
    ) -> Any:
        """Return y ``[tokens, rows filled up]`` of a plane of ``(rows, inputs, width, scale)``, perhaps cut in two."""
        rows, inputs, width, scale = shape
        groups, (q, scales, sums) = -(-rows // 16), x
        y = np.zeros((len(q), groups * 16), np.float32) if onto is None else onto.copy()
        plane = Plane(data.ctypes.data, groups, inputs // 32, width, scale)
        read = inputs // 32 if blocks is None else blocks
        given = Inputs(q.ctypes.data, scales.ctypes.data, sums.ctypes.data, len(q), inputs // 32, read)
        function: Callable[..., None] = getattr(self.library, f"flrc_product_{isa}")
        ranges = [(0, groups)] if cut is None else [(cut, groups), (0, cut)]
        for first, last in ranges:
            function(
                ctypes.byref(plane), ctypes.byref(given), first, last, y.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_ssize_t(groups * 16), ctypes.c_bool(onto is not None),
            )  # fmt: skip
        return y


def supported() -> list[str]:
    """Return the instruction sets that this machine has; /proc/cpuinfo says it on Linux."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    }
    return ["portable", *(name for name, need in needed.items() if need <= flags)]


def compiled(compiler: str, folder: Path, machine: str) -> list[str]:
    """Compile every source of a processor, warnings on, nothing hidden; return the objects."""
    more = SANITIZE if SANITIZED else []
    return [
        str(p) for p in build.compile_all(build.Compiler((compiler,)), folder, machine, more, warnings=True)
    ]


@pytest.fixture(scope="session")
def arm64_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Return what makes the command of a program of this folder, with the kernels in it, under qemu."""
    compiler = shutil.which(arm64_check.COMPILER)
    if EMULATOR is None or compiler is None:
        pytest.skip(f"qemu-aarch64 and {arm64_check.COMPILER} are needed (make test-needs NEEDS=--install)")
    folder = tmp_path_factory.mktemp("arm64")
    objects = compiled(compiler, folder, "aarch64")

    def program(name: str) -> list[str]:
        target, main = folder / name, Path(__file__).parent / f"arm64_{name}.c"
        options = ["-std=c11", "-O2", "-static", "-I", str(SOURCES)]
        subprocess.run([compiler, *options, str(main), *objects, "-o", str(target), "-lm"], check=True)
        return [str(EMULATOR), str(target)]

    return program


@pytest.fixture(scope="session")
def arm64(arm64_program: Callable[[str], list[str]]) -> list[str]:
    return arm64_program("product")


@pytest.fixture(scope="session")
def arm64_prepare(arm64_program: Callable[[str], list[str]]) -> list[str]:
    return arm64_program("prepare")


@pytest.fixture(scope="session")
def android(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, bytes]]:
    """Return a function that registers Android's library with Android's onnxruntime, under qemu."""
    if EMULATOR is None or shutil.which(arm64_check.COMPILER) is None or not ARCHIVE.is_file():
        pytest.skip(
            "qemu, the arm64 compiler or onnxruntime's archive is not on this machine (make test-needs)"
        )
    folder = tmp_path_factory.mktemp("android")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm64_check, "fetch", lambda: ARCHIVE.parent)
        arm64_check.build(folder)
    library = build.build(folder, "android-arm64")
    return partial(arm64_check.operators, EMULATOR, folder, library)


@pytest.fixture(scope="session")
def header() -> str:
    """Return onnxruntime's own header, out of the pinned Android archive."""
    if not ARCHIVE.is_file():
        pytest.skip("onnxruntime's Android archive is not on this machine (make android-tools)")
    with zipfile.ZipFile(ARCHIVE) as archive:
        return archive.read("headers/onnxruntime_c_api.h").decode()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the kernels' tests need a C compiler on x86-64")
    folder = tmp_path_factory.mktemp("kernels")
    objects = compiled(compiler, folder, "x86_64")
    library = folder / "libflrc.so"
    options = ["-shared", *(SANITIZE if SANITIZED else [])]
    subprocess.run([compiler, *options, "-o", str(library), *objects, "-lm"], check=True)
    return Kernels(library, supported())
