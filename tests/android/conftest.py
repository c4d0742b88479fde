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
import fetch_tools  # noqa: E402

# Of the user's own cache, before tests get one of their own.
TOOLS = fetch_tools.tools_folder()
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

    def reset_peak(self) -> None:
        """Let the peak of resident memory begin again (Linux)."""
        (Path("/proc") / str(self._process.pid) / "clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the peak of resident memory (Linux)."""
        status = (Path("/proc") / str(self._process.pid) / "status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])  # type: ignore[index]

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


@pytest.fixture(scope="session")
def java(tmp_path_factory: pytest.TempPathFactory) -> Java:
    """Return a function that runs a check of what needs no onnxruntime: (class, arguments…, stdin)."""
    sources = [
        path
        for kind in ("main", "test")
        for path in sorted((DEMO / "engine" / "src" / kind).rglob("*.java"))
        if "decode" not in path.parts
    ]
    classes = compiled(tmp_path_factory.mktemp("classes"), sources)
    return runner(["java", "-Xmx1g", "-cp", str(classes)])


@pytest.fixture(scope="session")
def engine_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command that runs a class of the whole engine, with onnxruntime in the JVM."""
    if not (TOOLS / fetch_tools.JAR).is_file():
        pytest.skip("onnxruntime's Java API is not on this machine (make android-tools)")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the JVM's onnxruntime is for Linux on x86-64")
    jar = TOOLS / fetch_tools.JAR
    sources = [
        path for part in ("engine", "desktop") for path in sorted((DEMO / part / "src").rglob("*.java"))
    ]
    classes = compiled(tmp_path_factory.mktemp("classes"), sources, "-cp", str(jar))
    return ["java", "-cp", os.pathsep.join((str(classes), str(jar))), f"-Donnxruntime.native.path={TOOLS}"]


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
