"""llama.cpp as a subject: its own ``llama-bench``, a process a turn, which cannot be stepped.

What it measures is its own: it loads the model, warms up, and times a prompt of random tokens or the making of tokens
behind one, without choosing them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FlrcError
from .subjects import Label

NANO = 1e-9
HINT = "docs/benchmarking.md says how to build one for this machine"


class LlamaBench:
    """A GGUF file in llama.cpp.

    Args:
        file: The GGUF file.
        threads: None for its choice.

    Raises:
        FlrcError: There is no ``llama-bench``, it is of before 2025, or it does not open the file.
    """

    steps = False
    reads = True
    accepted: float | None = None

    def __init__(self, file: Path, *, threads: int | None) -> None:
        command = shutil.which("llama-bench")
        if command is None:
            raise FlrcError("llama.cpp is measured by llama-bench, which is not on the PATH", hint=HINT)
        count = "" if threads is None else f" ({threads} thread{'s'[: threads - 1]})"
        self.label = Label(f"llama.cpp: {file.resolve().name}{count}")
        self._command = [command, "-m", str(file), "-ngl", "0", "-r", "1", "-o", "json"]
        if threads is not None:
            self._command += ["-t", str(threads)]
        self._depth = 0
        if "--n-depth" not in self._run([command, "--help"]):
            raise FlrcError(f"{command} cannot decode behind a prompt (it knows no --n-depth)", hint=HINT)
        self.version = f"llama.cpp {self._test(prompt=1)['build_commit']}"

    def read(self, ids: Sequence[int]) -> float:
        """Have it read as many tokens."""
        seconds: float = self._test(prompt=len(ids))["avg_ns"] * NANO
        return seconds

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Remember behind how many tokens it decodes."""
        self._depth = len(ids)

    def rewind(self) -> None:
        """Do nothing: every process begins anew."""

    def step(self) -> float:
        """Never asked."""
        raise NotImplementedError

    def run(self, tokens: int) -> float:
        """Have it make tokens."""
        seconds: float = self._test(decode=tokens)["avg_ns"] * NANO
        return seconds

    def end(self) -> None:
        """Do nothing: its processes have ended."""

    def close(self) -> None:
        """Do nothing: its processes have ended."""

    def _test(self, *, prompt: int = 0, decode: int = 0) -> dict[str, Any]:
        """Run one test; ``-p 0`` or ``-n 0`` leaves the other out."""
        depth = ["-d", str(self._depth)] if decode else []
        said = self._run([*self._command, "-p", str(prompt), "-n", str(decode), *depth])
        try:
            (found,) = json.loads(said)
            return {key: found[key] for key in ("avg_ns", "build_commit")}
        except (ValueError, KeyError, TypeError) as error:
            raise FlrcError(
                f"{self.label.bundle}: llama-bench answered with something else: {error}"
            ) from None

    def _run(self, command: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
        except OSError as error:
            raise FlrcError(f"{self.label.bundle}: llama-bench does not run: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()
            reason = said[-1] if said else f"it ended with {done.returncode}"
            raise FlrcError(f"{self.label.bundle}: llama-bench: {reason}")
        return done.stdout
