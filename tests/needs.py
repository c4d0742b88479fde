"""Gets what tests need beyond Python's packages, and says what this machine cannot run; ``make test`` begins with it.

What can be fetched goes to the user's cache, pinned by SHA-256. With ``--install``, programs come from Debian's
packages, where this is Debian and the user is root. What is not to be had is no error: its tests skip, and say why.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, run

sys.path.insert(0, str(Path(__file__).parents[1] / "android_demo" / "tools"))
import arm64_check
import fetch_sdk
import fetch_tools

SWIFTSHADER = "/usr/lib/chromium/libvk_swiftshader.so"
VULKAN = "the library vulkan"


@dataclass(frozen=True)
class Need:
    """What some tests need.

    Args:
        tests: Their name.
        programs: Programs, or files, and the Debian packages that have them.
        fetch: Gets what no package of this Debian has; ends with SystemExit where it cannot.
    """

    tests: str
    programs: dict[str, str]
    fetch: Callable[[], object] = lambda: None

    def missing(self) -> list[str]:
        """Return the programs that are not on this machine."""
        return [name for name in self.programs if not is_there(name)]

    def packages(self) -> list[str]:
        """Return the Debian packages of what is missing."""
        return [part for name in self.missing() for part in self.programs[name].split()]


ENGINE = {"javac": "default-jdk-headless", "npm": "npm", "gcc": "gcc libc6-dev"}
CROSS = {arm64_check.COMPILER: arm64_check.COMPILER_PACKAGES}
APK = {**fetch_sdk.PROGRAMS, str(fetch_sdk.FRAMEWORK): "android-framework-res", **CROSS}
NEEDS = (
    Need("the Android engine on a JVM", ENGINE, fetch_tools.fetch),
    Need("the APK", APK, fetch_sdk.fetch),
    Need("the engine that is in the APK", {"enjarify": "enjarify"}),
    Need("the APK's library under qemu", CROSS, arm64_check.qemu),
    Need("bench beside llama.cpp", {"llama-bench": "llama.cpp"}),
    Need("WebGPU on a software adapter", {SWIFTSHADER: "chromium", VULKAN: "libvulkan1"}),
)


def is_there(name: str) -> bool:
    """Tell whether this machine has a program, or a file that is named by its whole path."""
    if name == VULKAN:
        return ctypes.util.find_library("vulkan") is not None
    return Path(name).exists() if name.startswith("/") else shutil.which(name) is not None


def get(needs: Sequence[Need], *, install: bool) -> list[str]:
    """Get what tests need, as far as it goes, and return what cannot be run and why, a line each.

    Args:
        needs: Of the tests.
        install: Take programs from Debian's packages.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return [f"{need.tests}: it runs on Linux on x86-64" for need in needs]
    refusals = installed([need for need in needs if need.missing()]) if install else {}
    lines = []
    for need in needs:
        if missing := need.missing():
            reason = refusals.get(need.tests, f"apt-get install {' '.join(need.packages())}")
            lines.append(
                f"{need.tests}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing ({reason})"
            )
            continue
        try:
            need.fetch()
        except SystemExit as error:  # of the tools, one sentence
            lines.append(f"{need.tests}: {error}")
    return lines


def installed(needs: Sequence[Need]) -> dict[str, str]:
    """Install the Debian packages of each, and return why that could not be, by its name."""
    if not needs:
        return {}
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return {need.tests: "--install needs apt-get, and to be root" for need in needs}
    apt(["update"])  # some source of this machine may be out of reach: the packages may be there all the same
    refusals = {}
    for need in needs:  # one that is not to be had takes no other with it
        if reason := apt(["install", "-y", "--no-install-recommends", *need.packages()]):
            refusals[need.tests] = reason
    return refusals


def apt(arguments: Sequence[str]) -> str | None:
    """Run apt-get without a question; return its last words where it fails."""
    done = run(
        ["apt-get", "-q", *arguments],
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        stdin=DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    words = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
    return f"apt-get {arguments[0]}: {words}" if done.returncode else None


def main() -> None:
    """Get what can be had; say what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="install Debian's packages (root)")
    for line in get(NEEDS, install=parser.parse_args().install):
        print(f"could not run: {line}", flush=True)


if __name__ == "__main__":
    # Without a network a test run begins all the same.
    os.environ.setdefault("npm_config_fetch_retries", "1")
    os.environ.setdefault("npm_config_fetch_retry_mintimeout", "1000")
    main()
