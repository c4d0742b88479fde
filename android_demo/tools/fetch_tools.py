"""Fetch what the engine runs on, pinned by SHA-256, into the user's cache: onnxruntime's Java API and its libraries.

The Android archive (AAR) and the Linux library come out of one npm package, a re-publication that is MIT-licensed like
onnxruntime itself; so its hash is pinned. A person with network takes the official Maven coordinate instead. The JNI
library is Android's, made loadable here: its symbol versions, which name Android's libc, are made void.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
ONNXRUNTIME = "1.29.0"
AAR, LINUX = "package/Plugins/Android/onnxruntime.aar", "package/Plugins/Linux/x64/libonnxruntime.so"
AAR_FILE = "onnxruntime.aar"
JAR = "classes.jar"
STUBS = "libnnapistub.so"
KERNELS = Path(__file__).parents[2] / "runtime" / "flrc_runtime" / "flrc_kernels.so"
# DT_VERSYM, DT_VERDEF, DT_VERDEFNUM, DT_VERNEED, DT_VERNEEDNUM
_VERSION_TAGS = (0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF)
_ANDROID_LIBRARIES = ("c", "m", "dl", "log", "android")


def tools_folder() -> Path:
    """Return the folder of the fetched tools, there or not."""
    root = (
        os.environ.get("FLRC_EDGE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flrc-edge"
    )
    return Path(root) / "android" / f"onnxruntime-{ONNXRUNTIME}"


def fetch() -> Path:
    """Return the folder with ``onnxruntime.aar``, ``classes.jar`` and, on Linux x86-64, libraries for this JVM.

    Raises:
        SystemExit: A program is missing, or the package is not the pinned one.
    """
    folder = tools_folder()
    if (folder / JAR).is_file():
        return folder
    for program in ("npm", "gcc"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is needed to fetch onnxruntime's Java API, and is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch) / "tools"
        work.mkdir()
        done = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(
                f"{PACKAGE} could not be downloaded: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
            )
        archive = Path(scratch) / done.stdout.strip().splitlines()[-1]
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                sys.exit(f"{PACKAGE} is not the package that was pinned")
        with tarfile.open(archive) as package:
            for member, name in ((AAR, AAR_FILE), (LINUX, "libonnxruntime.so")):
                source = package.extractfile(member)
                assert source is not None
                with source, (work / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        with zipfile.ZipFile(work / AAR_FILE) as aar:
            jni = aar.read("jni/x86_64/libonnxruntime4j_jni.so")
            (work / "libonnxruntime4j_jni.so").write_bytes(without_versions(jni))
            _stubs(work)
            (work / JAR).write_bytes(aar.read(JAR))
        work.rename(folder)
    return folder


def without_versions(library: bytes) -> bytes:
    """Return a 64-bit ELF library whose dynamic section no longer speaks of symbol versions."""
    data = bytearray(library)
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for i in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, start + i * size)
        if kind != 2:  # PT_DYNAMIC
            continue
        for place in range(offset, offset + length, 16):
            (tag,) = struct.unpack_from("<Q", data, place)
            if tag in _VERSION_TAGS:
                struct.pack_into("<Q", data, place, 0x60000001 + tag % 16)  # a tag that loaders pass over
    return bytes(data)


def _stubs(folder: Path) -> None:
    """Build empty libraries of Android's names, and the one symbol that only Android's onnxruntime has."""
    for name in _ANDROID_LIBRARIES:
        file = f"lib{name}.so"
        _compile(folder / file, "", f"-Wl,-soname,{file}")
    _compile(
        folder / STUBS,
        "void *OrtSessionOptionsAppendExecutionProvider_Nnapi(void *o, unsigned f) { (void)o; (void)f; return 0; }",
    )


def _compile(target: Path, code: str, *options: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(target), *options]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{target.name} could not be built: {done.stderr.strip()}")


def java_environment(folder: Path) -> dict[str, str]:
    """Return the environment in which a JVM of this machine loads the libraries, the operators' if it is built."""
    own = {"FLRC_EDGE_KERNELS": str(KERNELS)} if KERNELS.is_file() else {}
    return {**os.environ, **own, "LD_PRELOAD": str(folder / STUBS), "LD_LIBRARY_PATH": str(folder)}


if __name__ == "__main__":
    print(fetch())
