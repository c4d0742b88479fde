"""Build, sign and check the APK without Gradle: ``make apk``.

aapt packs manifest, resources and the page; javac compiles app and engine; D8 makes dex; onnxruntime's arm64 libraries
come out of its Android archive, that of the operators is built (runtime/kernels/build.py). What is then in the APK is
looked at: signature, permissions, libraries, classes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fetch_sdk
import fetch_tools

from kernels import build as kernels

DEMO = Path(__file__).parents[1]
APP = DEMO / "app" / "src" / "main"
ABI = "arm64-v8a"
PLATFORM = "android-arm64"  # of runtime/kernels/build.py
MIN_API = "26"
MAIN_CLASS = "Ldev/flrc/app/MainActivity;"
DEBUG_PASSWORD = "android"  # of the key that is made here, as Android's own tools make one: it proves nothing


def build(target: Path, *, key: Path, password: str) -> None:
    """Write a signed APK; it appears whole or not at all.

    Args:
        target: The file.
        key: A key store; a debug key is made there if it is missing.
        password: Of the store and its key.

    Raises:
        SystemExit: A step fails; one line says which.
    """
    tools, sdk = fetch_tools.fetch(), fetch_sdk.fetch()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        work = Path(scratch)
        for name in ("gen", "classes", "dex"):
            (work / name).mkdir()
        unsigned, aligned, signed = (work / f"{name}.apk" for name in ("unsigned", "aligned", "signed"))
        run(
            [
                *("aapt", "package", "-f", "-m", "-J", work / "gen", "-M", APP / "AndroidManifest.xml"),
                *("-S", APP / "res", "-A", APP / "assets", "-I", fetch_sdk.FRAMEWORK, "-F", unsigned),
            ],
            "the resources",
        )
        folders = (APP / "java", DEMO / "engine" / "src" / "main", work / "gen")
        sources = [path for folder in folders for path in sorted(folder.rglob("*.java"))]
        libraries = os.pathsep.join((str(sdk / "android.jar"), str(tools / fetch_tools.JAR)))
        lint = ["-Xlint:all,-serial,-options,-classfile", "-Werror"]
        run(
            ["javac", "--release", "11", *lint, "-cp", libraries, "-d", work / "classes", *sources],
            "the sources",
        )
        run(
            [
                *("java", "-cp", sdk / "d8.jar", "com.android.tools.r8.D8", "--release"),
                *("--min-api", MIN_API),
                *("--lib", sdk / "android.jar", "--output", work / "dex"),
                *(*sorted((work / "classes").rglob("*.class")), tools / fetch_tools.JAR),
            ],
            "the dex file",
        )
        try:
            operators = kernels.build(work, PLATFORM)
        except kernels.BuildError as error:
            sys.exit(str(error))
        with (
            zipfile.ZipFile(tools / fetch_tools.AAR_FILE) as aar,
            zipfile.ZipFile(unsigned, "a", zipfile.ZIP_DEFLATED) as apk,
        ):
            for dex in sorted((work / "dex").glob("*.dex")):
                apk.write(dex, dex.name)
            for name in aar.namelist():
                if name.startswith(f"jni/{ABI}/") and name.endswith(".so"):
                    apk.writestr(f"lib/{ABI}/{Path(name).name}", aar.read(name))
            apk.write(operators, f"lib/{ABI}/{operators.name}")
        run(["zipalign", "-f", "-p", "4", unsigned, aligned], "the alignment")
        if not key.is_file():
            make_key(key, password)
        secret = {**os.environ, "FLRC_EDGE_KEY": password}
        run(
            ["apksigner", "sign", "--ks", key, "--ks-pass", "env:FLRC_EDGE_KEY", "--out", signed, aligned],
            "the signature",
            secret,
        )
        check(signed)
        signed.replace(target)


def check(apk: Path) -> None:
    """Refuse an APK that is not signed, asks for a permission, or lacks a library or the activity.

    Raises:
        SystemExit: It is one of these.
    """
    signature = run(["apksigner", "verify", "--verbose", "--min-sdk-version", MIN_API, apk], "the signature")
    for scheme in ("v2", "v3"):
        if not re.search(rf"{scheme} scheme .*: true", signature):
            sys.exit(f"the APK is not signed by scheme {scheme}")
    if "uses-permission" in run(["aapt", "dump", "permissions", apk], "the permissions"):
        sys.exit("the APK asks for a permission")
    badging = run(["aapt", "dump", "badging", apk], "the manifest")
    if not re.search(rf"native-code: '{ABI}'", badging):
        sys.exit(f"the APK is not for {ABI} alone")
    with zipfile.ZipFile(apk) as archive:
        names = set(archive.namelist())
        needed = {
            f"lib/{ABI}/libonnxruntime.so",
            f"lib/{ABI}/libonnxruntime4j_jni.so",
            f"lib/{ABI}/{kernels.PLATFORMS[PLATFORM].file}",
            "assets/ui/index.html",
        }
        if missing := sorted(needed - names):
            sys.exit(f"the APK lacks {', '.join(missing)}")
        dex = b"".join(archive.read(name) for name in sorted(names) if name.endswith(".dex"))
        if MAIN_CLASS.encode() not in dex:
            sys.exit(f"the APK lacks {MAIN_CLASS}")


def make_key(path: Path, password: str) -> None:
    """Make a key store with a debug key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    secret = {**os.environ, "FLRC_EDGE_KEY": password}
    run(
        [
            *("keytool", "-genkeypair", "-keystore", path, "-alias", "debug", "-dname", "CN=flrc-edge debug"),
            *("-storepass:env", "FLRC_EDGE_KEY", "-keypass:env", "FLRC_EDGE_KEY"),
            *("-keyalg", "RSA", "-keysize", "2048", "-validity", "10000"),
        ],
        "the debug key",
        secret,
    )


def run(command: list[object], what: str, environment: dict[str, str] | None = None) -> str:
    """Return what a program prints; end with its last words where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} failed:\n{(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return done.stdout


def main() -> None:
    """Build the APK that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--key", type=Path, help="a key store; without it a debug key in the user's cache")
    given = parser.parse_args()
    key = given.key or fetch_sdk.sdk_folder() / "debug.jks"
    password = os.environ.get("FLRC_EDGE_KEY_PASSWORD", DEBUG_PASSWORD)
    build(given.target, key=key, password=password)
    print(f"{given.target}: {given.target.stat().st_size / 1e6:.1f} MB, signed, no permission, {ABI}")


if __name__ == "__main__":
    main()
