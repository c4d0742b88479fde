"""The Java engine of the Android demo, compiled once and run on this machine's JVM."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "android_demo"
sys.path.insert(0, str(DEMO / "tools"))
import dex_roundtrip  # noqa: E402
import fetch_sdk  # noqa: E402
import fetch_tools  # noqa: E402

# Of the user's own cache, before tests get one of their own.
TOOLS, SDK = fetch_tools.tools_folder(), fetch_sdk.sdk_folder()
APK = (
    os.environ.get("FLRC_EDGE_APK") or None
)  # an APK whose classes all tests here run on, instead of the sources'
Java = Callable[..., "subprocess.CompletedProcess[str]"]


class Host:
    """Sends commands to the engine and reads its events."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        event: dict[str, Any] = json.loads(self._process.stdout.readline())
        return event

    def memory_bytes(self) -> int:
        """Return the memory of the process (PSS: a page of a file counts once, mapped how often it may be; Linux)."""
        maps = (Path("/proc") / str(self._process.pid) / "smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Pss:\s*(\d+)", maps, re.M)[1])  # type: ignore[index]

    def until(self, *types: str) -> list[dict[str, Any]]:
        """Return the events up to one of these types."""
        found = [self.event()]
        while found[-1]["type"] not in types:
            found.append(self.event())
        return found


def compiled(folder: Path, sources: list[Path], *options: str) -> Path:
    """Compile as Android does (Java 11); every warning is an error."""
    if shutil.which("javac") is None:
        pytest.skip("javac is not installed (a JDK of version 11 or newer)")
    command = ["javac", "--release", "11", "-Xlint:all,-serial", "-Werror", "-d", str(folder), *options]
    done = subprocess.run([*command, *map(str, sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def runner(command: list[str], environment: dict[str, str] | None = None) -> Java:
    def run(name: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, f"dev.flrc.engine.{name}", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
            env=environment,
        )

    return run


def java_command(
    folder: Path, engine: list[Path], checks: list[Path], *libraries: Path, apk_classes: Path | None = None
) -> list[str]:
    """Compile the engine and what asks it; with the classes of an APK, these run in place of the compiled engine."""
    jars = [str(path) for path in libraries]
    built, asking = folder / "engine", folder / "checks"
    for path in (built, asking):
        path.mkdir()
    compiled(built, engine, "-cp", os.pathsep.join([str(built), *jars]))
    compiled(asking, checks, "-cp", os.pathsep.join([str(built), *jars]))
    if apk_classes is not None:  # onnxruntime's Java API is among them
        return ["java", *dex_roundtrip.JVM_OPTIONS, "-cp", os.pathsep.join([str(asking), str(apk_classes)])]
    return ["java", "-cp", os.pathsep.join([str(asking), str(built), *jars])]


def sources(part: str) -> list[Path]:
    return sorted((DEMO / part).rglob("*.java"))


@pytest.fixture(scope="session")
def apk_classes(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Return the classes of the APK that all tests here are to run on, if one is named."""
    if APK is None:
        return None
    jar = tmp_path_factory.mktemp("apk") / "apk.jar"
    dex_roundtrip.convert(Path(APK), jar)
    return jar


@pytest.fixture(scope="session")
def java(tmp_path_factory: pytest.TempPathFactory, apk_classes: Path | None) -> Java:
    """Return a function that runs a check of what needs no onnxruntime: (class, arguments…, stdin)."""
    engine = [path for path in sources("engine/src/main") if "decode" not in path.parts]
    command = java_command(
        tmp_path_factory.mktemp("java"), engine, sources("engine/src/test"), apk_classes=apk_classes
    )
    return runner([command[0], "-Xmx1g", *command[1:]])


def needs_onnxruntime() -> None:
    """Skip where the JVM has no onnxruntime."""
    if not (TOOLS / fetch_tools.JAR).is_file():
        pytest.skip("onnxruntime's Java API is not on this machine (make android-tools)")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the JVM's onnxruntime is for Linux on x86-64")


@pytest.fixture(scope="session")
def engine_command(tmp_path_factory: pytest.TempPathFactory, apk_classes: Path | None) -> list[str]:
    """Return the command that runs a class of the whole engine, with onnxruntime in the JVM."""
    needs_onnxruntime()
    checks = [*sources("engine/src/test"), *sources("engine/src/decodeTest"), *sources("desktop/src")]
    folder, engine = tmp_path_factory.mktemp("java"), sources("engine/src/main")
    command = java_command(folder, engine, checks, TOOLS / fetch_tools.JAR, apk_classes=apk_classes)
    return [*command, f"-Donnxruntime.native.path={TOOLS}"]


@pytest.fixture(scope="session")
def java_decoder(engine_command: list[str]) -> Java:
    """Return a function that runs a check of the whole engine."""
    return runner(engine_command, fetch_tools.java_environment(TOOLS))


def hosted(command: list[str], *arguments: object) -> Iterator[Host]:
    with subprocess.Popen(
        [*command, "dev.flrc.desktop.HostMain", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=fetch_tools.java_environment(TOOLS),
    ) as process:
        yield Host(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def host(engine_command: list[str]) -> Iterator[Host]:
    """The engine behind JSON lines, as the app's page talks to it."""
    yield from hosted(engine_command)


@pytest.fixture
def library(engine_command: list[str], tmp_path: Path) -> Iterator[Host]:
    """The engine and a folder of bundles, ``library`` of ``tmp_path``, behind JSON lines."""
    yield from hosted(engine_command, tmp_path / "library")
