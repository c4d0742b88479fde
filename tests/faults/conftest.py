"""Runs of the command line that are killed, or whose n-th file operation fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "tests" / "data" / "stories260k"
SMALL = ("--stages", ".9,.8", "--boundaries", "8", "--window", "256", "--rank-step", "8")  # of compress


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Run:
    """How a command line ended: its exit code (or minus the signal), wall time, words, and file operations."""

    status: int
    seconds: float
    log: str
    operations: int | None


class Zygote:
    """Forks command lines from a process that has imported everything."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self._process = process
        self._scratch = scratch

    def run(
        self,
        *arguments: object,
        cache: Path,
        delay: float | None = None,
        after: str | None = None,
        signal: int = 9,
        fail: int | None = None,
        watched: Path | None = None,
        room: int | None = None,
    ) -> Run:
        """Run a command line.

        Args:
            arguments: Of the command line.
            cache: Its FLRC_EDGE_CACHE.
            delay: Seconds after which it gets the signal.
            after: Words in its log that it gets the signal upon.
            signal: Which one.
            fail: Number of the file operation that fails.
            watched: Folder whose file operations count.
            room: Bytes that it may map more than it has.
        """
        request: dict[str, Any] = {
            "arguments": [str(a) for a in arguments],
            "cache": str(cache),
            "scratch": str(self._scratch),
            "watched": str(watched or self._scratch),
            "delay": delay,
            "after": after,
            "signal": signal,
            "fail": fail,
            "room": room,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if sys.platform != "linux":
        pytest.skip("forks processes and looks at them in /proc (Linux)")
    path = os.pathsep.join(str(ROOT / part) for part in ("", "exporters", "runtime"))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote", str(STORIES)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Zygote(process, tmp_path_factory.mktemp("zygote"))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
