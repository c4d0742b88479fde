"""Builds a wheel for every platform and looks at each; runs the two of Linux: ``make wheels``.

Needs hatchling and ziglang in this Python; to run the one of arm64, also what android_demo/tools/arm64_check.py needs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "android_demo" / "tools")]
from kernels import build, symbols  # noqa: E402

PLATFORMS = [name for name, platform in build.PLATFORMS.items() if platform.tag]
RUN = """
import sys
from pathlib import Path
import onnxruntime
from flrc_runtime import kernels
options = onnxruntime.SessionOptions()
kernels.register(options)
assert kernels.library().is_relative_to(Path(sys.argv[1]).resolve()), kernels.library()
print(kernels.isa(), kernels.VERSION)
"""


class WheelError(Exception):
    """One sentence: what is wrong with a wheel."""


def make(platform: str, folder: Path) -> Path:
    """Build the wheel of a platform.

    Raises:
        WheelError: The back end fails.
    """
    code = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.resolve())],
        cwd=ROOT,
        env={**os.environ, "FLRC_EDGE_PLATFORM": platform},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise WheelError(
            f"the wheel of {platform} was not built: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return folder / done.stdout.split()[-1]


def check(wheel: Path, platform: str) -> str:
    """Return what a wheel holds, in a line.

    Raises:
        WheelError: Its name, its library or what this one shows and needs is not as it must be.
    """
    to = build.PLATFORMS[platform]
    if not wheel.name.endswith(f"-py3-none-{to.tag}.whl"):
        raise WheelError(f"{wheel.name} is not named as a wheel of {to.tag}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [n for n in archive.namelist() if "flrc_kernels" in n]
        if libraries != [f"flrc_runtime/{to.file}"]:
            raise WheelError(f"{wheel.name} holds {libraries}, not flrc_runtime/{to.file}")
        data = archive.read(libraries[0])
        (about,) = (n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        if "Root-Is-Purelib: false" not in archive.read(about).decode():
            raise WheelError(f"{wheel.name} says that it serves every platform")
    try:
        found = symbols.read(data)
    except ValueError as error:
        raise WheelError(f"{wheel.name}: {error}") from None
    if found.machine != to.machine:
        raise WheelError(f"{wheel.name}: its library is of {found.machine}")
    if found.exports != symbols.EXPORTS:
        raise WheelError(f"{wheel.name}: its library shows {sorted(found.exports)}")
    if found.glibc > (2, 17):
        raise WheelError(f"{wheel.name}: its library needs glibc {found.glibc[0]}.{found.glibc[1]}")
    return f"{wheel.name}: {found.kind} of {found.machine}, {len(data)} bytes"


def run(wheel: Path, platform: str) -> str:
    """Return the instruction set and version that the library of a wheel of Linux gives, or why it was not run.

    Raises:
        WheelError: It does not load, or onnxruntime refuses it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")
        if platform == "linux-aarch64":
            return _emulated(folder, folder / "wheel" / "flrc_runtime" / build.PLATFORMS[platform].file)
        if platform != f"linux-{build.this_machine().machine}" or sys.platform != "linux":
            return "not run: another machine's"
        done = subprocess.run(
            [sys.executable, "-c", RUN, folder / "wheel"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder / "wheel")},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise WheelError(f"{wheel.name} does not run: {done.stderr.strip().splitlines()[-1]}")
        return f"runs: {done.stdout.strip()}"


def _emulated(folder: Path, library: Path) -> str:
    import arm64_check
    import fetch_tools

    emulator = arm64_check.installed_qemu()
    if emulator is None or not (fetch_tools.tools_folder() / fetch_tools.AAR_FILE).is_file():
        return "not run: qemu or onnxruntime's arm64 library is not here (make android-arm64)"
    try:
        arm64_check.build(folder)
        said = [
            arm64_check.operators(emulator, folder, library, core=core)[0]
            for core in ("cortex-a53", "cortex-a76")
        ]
    except SystemExit as error:
        raise WheelError(f"the library of linux-aarch64 does not run: {error}") from None
    return f"runs under qemu: {', '.join(said)}"


def main() -> None:
    """Build, check and run the wheels that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="only this one")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        for platform in given.platform or PLATFORMS:
            wheel = make(platform, given.folder)
            said = check(wheel, platform)
            print(f"{said}; {run(wheel, platform)}" if platform.startswith("linux-") else said)
    except WheelError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
