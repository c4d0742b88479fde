"""onnxruntime-genai as a subject, in a process of its own that sleeps when it is another's turn."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FlrcError, UsageError
from .subjects import Label

_PROGRAM = Path(__file__).with_name("genai_peer.py")


class Genai:
    """A model of onnxruntime-genai in its own loop.

    Args:
        folder: With its ``genai_config.json``.
        threads: Of one operator; None for its choice.

    Raises:
        UsageError: It is not such a folder.
        FlrcError: onnxruntime-genai is not installed, or does not open it.
    """

    steps = reads = True
    accepted: float | None = None

    def __init__(self, folder: Path, *, threads: int | None) -> None:
        if not (folder / "genai_config.json").is_file():
            raise UsageError(
                f"{folder.name} is not a folder of onnxruntime-genai: it has no genai_config.json"
            )
        if importlib.util.find_spec("onnxruntime_genai") is None:
            raise FlrcError("onnxruntime-genai is not installed", hint="pip install 'flrc-edge[genai]'")
        self.label = Label(f"genai: {folder.resolve().name}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(folder.resolve()), str(threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )
        try:
            self.version = f"genai {self._answer()['version']}"
        except BaseException:
            self.close()
            raise

    def read(self, ids: Sequence[int]) -> float:
        """Have it read a prompt."""
        return self._ask("read", ids=list(ids), tokens=0)

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Have it read what decoding goes on from."""
        self._ask("read", ids=list(ids), tokens=tokens)

    def rewind(self) -> None:
        """Have it go back."""
        self._ask("rewind")

    def step(self) -> float:
        """Have it make one token."""
        return self._ask("run", tokens=1)

    def run(self, tokens: int) -> float:
        """Have it make tokens; a first one behind going back does not count."""
        self.rewind()
        self.step()
        return self._ask("run", tokens=tokens)

    def end(self) -> None:
        """Have it free the sequence."""
        self._ask("end")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, what: str, **arguments: object) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended; what it said is read next
        seconds: float = self._answer()["seconds"]
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the rest is its library talking
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise FlrcError(f"{self.label.bundle}: {answer['error']}")
                return answer
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().splitlines()
        raise FlrcError(f"{self.label.bundle} ended: {said[-1] if said else 'it said nothing'}")
