"""How the operator library is built, packed, found and refused."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from flrc_runtime import FlrcError, kernels
from kernels import build, symbols, wheels

ROOT = Path(__file__).parents[2]
# A library whose version and answers a test chooses.
OTHER = """
#include "ort_api.h"
#define EXPORT __attribute__((visibility("default")))
EXPORT int flrc_kernels_version(void) { return VERSION; }
EXPORT const char *flrc_kernels_isa(void) { return "portable"; }
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  (void)options;
  return ORT(base->get_api(FLRC_ORT_VERSION), CreateStatus)(ORT_INVALID_ARGUMENT, "it does not want to");
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's library, as an installation has it."""
    if build.native_compiler() is None and build.zig() is None:
        pytest.skip("there is no C compiler")
    return build.build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def here(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernels, "_FOLDER", built.parent)
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    return built


def other(folder: Path, version: int, code: str = OTHER) -> None:
    """Build a library that is not this runtime's."""
    compiler = build.native_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    (folder / "other.c").write_text(code)
    options = [f"-DVERSION={version}", "-I", build.SOURCES, "-shared", "-fPIC", folder / "other.c"]
    compiler.run([*options, "-o", folder / kernels.FILE])


def refused(action: Any = None) -> str:
    with pytest.raises(FlrcError) as caught:
        (action or (lambda: kernels.register(onnxruntime.SessionOptions())))()
    assert caught.value.hint is None or "\n" not in caught.value.hint
    assert "\n" not in str(caught.value)
    return f"{caught.value} ({caught.value.hint})"


def test_it_shows_three_functions_and_no_more(built: Path) -> None:
    found = symbols.read(built.read_bytes())
    assert found.exports == symbols.EXPORTS
    assert found.machine == build.this_machine().machine


def test_it_is_found_and_registered(here: Path) -> None:
    assert kernels.library() == here and kernels.isa() in kernels.ISAS
    options = onnxruntime.SessionOptions()
    kernels.register(options)


def test_an_instruction_set_is_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del here
    monkeypatch.setenv(kernels.ENVIRONMENT, "portable")
    assert kernels.isa() == "portable"
    not_here = "neon" if build.this_machine().machine == "x86_64" else "avx2"
    for name, message in ((not_here, "which this machine does not have"), ("sse", "no instruction set of")):
        monkeypatch.setenv(kernels.ENVIRONMENT, name)
        assert f"is {name!r}, " in refused() and message in refused(kernels.isa)


def test_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    assert "is not built" in refused() and "pip install" in refused(kernels.library)
    monkeypatch.undo()
    assert kernels.remedy().endswith("build.py")  # in a checkout


def test_it_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    (tmp_path / kernels.FILE).write_text("no library")
    assert "cannot be loaded" in refused()


def test_it_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    other(tmp_path, 0, "int nothing;")
    assert "no library of flrc-edge's operators" in refused()


def test_it_is_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    other(tmp_path, kernels.VERSION + 1)
    assert f"is of version {kernels.VERSION + 1}, this runtime needs {kernels.VERSION}" in refused()


def test_onnxruntime_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    other(tmp_path, kernels.VERSION)
    assert "it does not want to" in refused()


def test_the_version_stands_twice() -> None:
    source = (build.SOURCES / "register.c").read_text()
    assert f"#define FLRC_KERNELS_VERSION {kernels.VERSION} " in source


def test_files_belong_to_processors_by_their_names() -> None:
    for machine, ends in (
        ("x86_64", ("avx2", "avx_vnni", "avx512")),
        ("aarch64", ("neon",)),
        ("riscv64", ()),
    ):
        names = {path.stem for path in build.sources(machine)}
        assert {"dispatch", "register", "product_portable"} <= names
        for end in build.SETS:
            assert any(name.endswith(f"_{end}") for name in names) == (end in ends)
    assert build.flags(Path("x_avx_vnni.c")) == build.SETS["avx_vnni"][1]
    assert build.flags(Path("x_portable.c")) == build.flags(Path("linear.c")) == ()


def test_a_changed_source_makes_it_stale(built: Path) -> None:
    newest = max(path.stat().st_mtime for path in build.SOURCES.rglob("*.[ch]"))
    assert build.is_fresh(built)
    before = built.stat()
    os.utime(built, (newest - 1, newest - 1))
    try:
        assert not build.is_fresh(built)
    finally:
        os.utime(built, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not build.is_fresh(built.with_name("missing"))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "zig", lambda: None)
    build.native_compiler.cache_clear()
    try:
        with pytest.raises(build.BuildError, match="pip install ziglang"):
            build.build(tmp_path)
        with pytest.raises(build.BuildError, match="pip install ziglang"):
            build.build(tmp_path, "macos-arm64")
        monkeypatch.setenv("CC", "a-compiler-that-is-not-here -O1")
        build.native_compiler.cache_clear()
        with pytest.raises(build.BuildError, match="a-compiler-that-is-not-here cannot be run"):
            build.build(tmp_path)
    finally:
        build.native_compiler.cache_clear()
    assert not list(tmp_path.iterdir())


def hook_asks_for(environment: dict[str, str]) -> list[str]:
    """Return what Hatchling would install to build a wheel."""
    code = "import hatchling.build as b; print(*b.get_requires_for_build_wheel(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_ziglang_is_asked_for_where_there_is_no_compiler(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    if build.zig() is not None:
        pytest.skip("ziglang is installed")
    plain = {k: v for k, v in os.environ.items() if k not in ("CC", "FLRC_EDGE_PLATFORM")}
    if build.native_compiler() is not None:
        assert hook_asks_for(plain) == []
    assert hook_asks_for(plain | {"PATH": str(tmp_path)}) == ["ziglang>=0.14"]
    assert hook_asks_for(plain | {"FLRC_EDGE_PLATFORM": "macos-arm64"}) == ["ziglang>=0.14"]


def test_the_wheel_of_this_platform(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    code = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "FLRC_EDGE_PLATFORM"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wheel = tmp_path / done.stdout.split()[-1]
    tag = build.this_machine().tag or sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "flrc_kernels" in name]
        assert names == [f"flrc_runtime/{built.name}"]
        assert symbols.read(archive.read(names[0])).exports == symbols.EXPORTS
        assert not [n for n in archive.namelist() if n.endswith((".c", ".h")) or "build.py" in n]


def test_a_damaged_library_is_one_error(built: Path) -> None:
    data = built.read_bytes()
    for size in (0, 3, 40, 63, 64, 200, len(data) // 2):
        with pytest.raises(ValueError, match=r"."):
            symbols.read(data[:size])


def thread_locals(library: bytes) -> bool:
    """Return whether an ELF library has a block of thread-locals (PT_TLS)."""
    (start,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    return 7 in [struct.unpack_from("<I", library, start + i * size)[0] for i in range(count)]


def test_the_android_library(tmp_path: Path) -> None:
    if build.cross_compiler(build.PLATFORMS["android-arm64"]) is None:
        pytest.skip("neither ziglang nor aarch64-linux-gnu-gcc is installed")
    data = build.build(tmp_path, "android-arm64").read_bytes()
    found = symbols.read(data)
    assert (found.kind, found.machine, found.exports) == ("elf", "aarch64", symbols.EXPORTS)
    assert found.glibc == (0, 0) and not thread_locals(data)
    assert b"\0libc.so\0" in data and b"libc.so.6" not in data


@pytest.mark.full
@pytest.mark.parametrize("platform", wheels.PLATFORMS)
def test_wheels_of_other_platforms(tmp_path: Path, platform: str) -> None:
    if importlib.util.find_spec("hatchling") is None or build.zig() is None:
        pytest.skip("hatchling and ziglang are needed (make wheels)")
    wheel = wheels.make(platform, tmp_path)
    assert build.PLATFORMS[platform].tag in wheels.check(wheel, platform)
    with pytest.raises(wheels.WheelError, match="is not named as a wheel of"):
        wheels.check(wheel, next(name for name in wheels.PLATFORMS if name != platform))
    if platform.startswith("linux-"):
        assert wheels.run(wheel, platform).startswith(("runs", "not run: "))
