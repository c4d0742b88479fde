"""Builds the operator library: the one owner of its sources, flags and platforms. Needs Python and a C compiler.

    python runtime/kernels/build.py                               # for this machine, where the runtime looks for it
    python runtime/kernels/build.py --platform macos-arm64 -o out # for another one; needs ziglang

The compiler is $CC, else gcc, clang or cc, else ziglang (pip install ziglang); for another platform ziglang.
What a file is compiled with the end of its name says, ``*_avx2.c``, ``*_neon.c``, …; other processors' are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
PACKAGE = SOURCES.parent / "flrc_runtime"  # where flrc_runtime/kernels.py looks
FLAGS = ("-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
WARNINGS = ("-Wall", "-Wextra", "-Wconversion")
# Ends of file names -> the processor they are of, and their flags; dispatch.c asks for the same before it calls them.
SETS = {
    "avx2": ("x86_64", ("-mavx2", "-mfma", "-mf16c")),
    "avx_vnni": ("x86_64", ("-mavx2", "-mfma", "-mf16c", "-mavxvnni")),
    "avx512": ("x86_64", ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni")),
    "neon": ("aarch64", ("-march=armv8.2-a+dotprod",)),
}
# In ziglang's words; register 18 is the system's on phones.
ZIG_FLAGS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod+reserve_x18"}
# For Android without its C library: register 18 is the system's, atomics are no calls, thread-locals not of Android 10.
BARE_ZIG = ("-mcpu=generic+reserve_x18", "-femulated-tls")
BARE_GCC = ("-ffixed-x18", "-mno-outline-atomics")
# Nothing but what is used, no symbols; phones may have pages of 16 KB.
ELF = ("-shared", "-s", "-Wl,--gc-sections", "-Wl,-z,defs", "-Wl,-z,max-page-size=16384")


class BuildError(Exception):
    """One sentence: what is missing, or what the compiler said."""


@dataclass(frozen=True)
class Platform:
    """What a library is built for.

    Args:
        machine: The processor: ``x86_64`` or ``aarch64``.
        file: The library's name.
        zig: ziglang's name of the platform.
        tag: What a wheel's name ends in; empty: no wheel.
        link: Options of the linker.
    """

    machine: str
    file: str
    zig: str
    tag: str
    link: tuple[str, ...]
    headers: Path | None = None  # of a C library that ziglang does not have


PLATFORMS = {
    "linux-x86_64": Platform(
        "x86_64", "flrc_kernels.so", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", ELF
    ),
    "linux-aarch64": Platform(
        "aarch64", "flrc_kernels.so", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", ELF
    ),
    "macos-arm64": Platform(
        "aarch64", "flrc_kernels.dylib", "aarch64-macos.11.0", "macosx_11_0_arm64", ("-shared",)
    ),
    "windows-x86_64": Platform(
        "x86_64", "flrc_kernels.dll", "x86_64-windows-gnu", "win_amd64", ("-shared", "-s")
    ),
    "android-arm64": Platform(
        "aarch64",
        "libflrc_kernels.so",
        "aarch64-linux-none",  # for its android, clang makes calls of atomics whatever is asked
        "",
        (*ELF, "-Wl,-soname,libflrc_kernels.so"),
        SOURCES / "android",
    ),
}


@dataclass(frozen=True)
class Compiler:
    """A C compiler: its command, and whether it is ziglang's, which names some flags in other words."""

    command: tuple[str, ...]
    zig: bool = False

    def run(self, arguments: Sequence[object]) -> None:
        """Run it.

        Raises:
            BuildError: It fails.
        """
        line = [*self.command, *(ZIG_FLAGS.get(str(a), str(a)) if self.zig else str(a) for a in arguments)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise BuildError(f"{self.command[0]} cannot be run: {error.strerror or error}") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise BuildError(f"{shlex.join(self.command)} failed:\n{said}")

    def takes(self, flags: Sequence[str]) -> bool:
        """Return whether it is there and knows these flags."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                source = Path(scratch) / "empty.c"
                source.write_text("#include <stdlib.h>\nint nothing;\n")
                self.run([*flags, "-Werror", "-c", source, "-o", Path(scratch) / "empty.o"])
        except BuildError:
            return False
        return True


def this_machine() -> Platform:
    """Return what a library of this machine is."""
    names = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
    processor = platform.machine().lower()
    machine = names.get(processor, processor)
    if sys.platform == "win32":
        return Platform(
            machine, "flrc_kernels.dll", f"{machine}-windows-gnu", "", PLATFORMS["windows-x86_64"].link
        )
    if sys.platform == "darwin":
        tag = f"macosx_11_0_{'arm64' if machine == 'aarch64' else machine}"
        link = ("-shared", "-mmacosx-version-min=11.0")
        return Platform(machine, "flrc_kernels.dylib", f"{machine}-macos.11.0", tag, link)
    return Platform(machine, "flrc_kernels.so", "native", "", ELF)


def sources(machine: str) -> list[Path]:
    """Return the files that a processor's library is made of."""
    return [p for p in sorted(SOURCES.glob("*.c")) if (s := _set(p)) is None or SETS[s][0] == machine]


def flags(source: Path) -> tuple[str, ...]:
    """Return what a file is compiled with, beside what all are: its instruction set."""
    name = _set(source)
    return () if name is None else SETS[name][1]


def _set(source: Path) -> str | None:
    return next((name for name in SETS if source.stem.endswith(f"_{name}")), None)


def zig() -> Compiler | None:
    """Return ziglang's compiler, of this Python or on the PATH."""
    if importlib.util.find_spec("ziglang") is not None:
        return Compiler((sys.executable, "-m", "ziglang", "cc"), zig=True)
    found = shutil.which("zig")
    return None if found is None else Compiler((found, "cc"), zig=True)


@cache
def native_compiler() -> Compiler | None:
    """Return this machine's compiler: $CC, else the first that knows all flags; None if only ziglang may help."""
    asked = os.environ.get("CC", "")
    if asked:
        return Compiler(tuple(shlex.split(asked, posix=sys.platform != "win32")))
    needed = {flag for path in sources(this_machine().machine) for flag in flags(path)}
    # gcc keeps registers of 512 bits on a stack of Windows that is not aligned for them.
    for name in ("clang",) if sys.platform == "win32" else ("gcc", "clang", "cc"):
        if shutil.which(name) and (found := Compiler((name,))).takes([*FLAGS, *sorted(needed)]):
            return found
    return None


def cross_compiler(to: Platform) -> Compiler | None:
    """Return a compiler for another platform: ziglang, for Android also a gcc, as neither has its C library."""
    if (found := zig()) is not None or to.headers is None or not shutil.which("aarch64-linux-gnu-gcc"):
        return found
    return Compiler(("aarch64-linux-gnu-gcc",))


def compile_all(
    compiler: Compiler, folder: Path, machine: str, more: Sequence[str] = (), *, warnings: bool = False
) -> list[Path]:
    """Compile every source of a processor; return the objects.

    Args:
        compiler: What compiles.
        folder: Of the objects.
        machine: The processor.
        more: Flags beside those of all and of a file.
        warnings: Print them on; otherwise there are none.
    """

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        said = WARNINGS if warnings else ("-w",)
        compiler.run([*FLAGS, *said, *more, *flags(source), "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources(machine)))


def build(folder: Path = PACKAGE, name: str | None = None, own: Compiler | None = None) -> Path:
    """Build the library into a folder, where it appears whole or not at all.

    Args:
        folder: Where to.
        name: One of PLATFORMS; None: this machine.
        own: A compiler for that platform, with its C library (the NDK's); None: ziglang, or this machine's.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    to = this_machine() if name is None else PLATFORMS[name]
    compiler = own or (cross_compiler(to) if name is not None else native_compiler() or zig())
    if compiler is None:
        what = "no C compiler that knows its instruction sets is" if name is None else "ziglang is not"
        raise BuildError(f"the operator library cannot be built: {what} here; pip install ziglang")
    target: list[str] = []
    if compiler.zig:  # by itself it would use whatever this very processor has
        target = ["-mcpu=baseline"] if name is None else ["-target", to.zig]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        more = ["-fvisibility=hidden", "-ffunction-sections", *target]
        if own is None and to.headers is not None:
            more += ["-isystem", str(to.headers), *(BARE_ZIG if compiler.zig else BARE_GCC)]
            objects = compile_all(compiler, work, to.machine, more)
            _link_alone(compiler, to, work, objects, target)
        else:
            objects = compile_all(compiler, work, to.machine, more)
            compiler.run([*target, *to.link, "-o", work / to.file, *objects, "-lm"])
        return (work / to.file).replace(folder / to.file)


def _link_alone(
    compiler: Compiler, to: Platform, work: Path, objects: list[Path], target: Sequence[str]
) -> None:
    """Link where the C library is not to be had: against an empty one with the names that our headers declare."""
    assert to.headers is not None
    names = re.findall(r"^\w[\w *]*?(\w+)\(", (to.headers / "libc.h").read_text(), re.M)
    stub, source, libc = work / "stub.o", work / "stub.c", work / "libc.so"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    compiler.run([*target, "-fPIC", "-fno-builtin", "-w", "-c", source, "-o", stub])
    if not compiler.zig:
        compiler.run(["-nostdlib", "-shared", "-Wl,-soname,libc.so", "-o", libc, stub])
        compiler.run(["-nostdlib", *to.link, "-o", work / to.file, *objects, libc])
        return
    linker = Compiler((*compiler.command[:-1], "ld.lld"))  # its cc does not link without a C library
    linker.run(["-shared", "-soname", libc.name, "-o", libc, stub])
    options = [part for option in to.link for part in option.removeprefix("-Wl,").split(",")]
    linker.run([*options, "-o", work / to.file, *objects, libc])


def is_fresh(library: Path) -> bool:
    """Return whether a library is newer than all it is made of."""
    if not library.is_file():
        return False
    made_of = [*SOURCES.rglob("*.[ch]"), SOURCES / "build.py"]
    return library.stat().st_mtime >= max(path.stat().st_mtime for path in made_of)


def main() -> None:
    """Build what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="another one than this machine; needs ziglang")
    parser.add_argument("--compiler", help="of that platform, with its C library: the NDK's clang")
    parser.add_argument("-o", "--output", type=Path, help="the folder; without it, where the runtime looks")
    parser.add_argument("--force", action="store_true", help="build it also if it is newer than its sources")
    given = parser.parse_args()
    if given.platform and not given.output:
        parser.error("--platform needs -o: the runtime's folder holds this machine's library")
    folder = given.output or PACKAGE
    file = (PLATFORMS[given.platform] if given.platform else this_machine()).file
    try:
        if given.force or not is_fresh(folder / file):
            own = Compiler(tuple(shlex.split(given.compiler))) if given.compiler else None
            build(folder, given.platform, own)
    except BuildError as error:
        sys.exit(f"Error: {error}")
    print(folder / file)


if __name__ == "__main__":
    main()
