"""Other programs that decode the same model, each in a process of its own, asked in turn with ours.

They get the same token ids and answer with the seconds they spent, as one JSON object a line on pipes. While they wait
for the next question their threads sleep.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FlrcError, UsageError
from .subjects import Label, Spent

_HERE = Path(__file__).parent


class Peer:
    """A running peer.

    Args:
        name: ``genai`` or ``llama.cpp``.
        path: What it opens: a folder of onnxruntime-genai, a GGUF file.
        threads: Of one operator; None for the peer's choice.
        context: Positions of its cache.

    Raises:
        UsageError: There is no such peer or file.
        FlrcError: It is not installed, or does not open the file.
    """

    def __init__(self, name: str, path: Path, *, threads: int | None, context: int) -> None:
        commands = {"genai": _genai, "llama.cpp": _llama_cpp}
        if name not in commands:
            raise UsageError(f"{name!r} is not a peer", hint=f"peers: {', '.join(commands)}")
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        self.label = Label(f"{name}: {path.resolve().name}")
        command = commands[name](path.resolve())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [*command, str(threads or 0), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )
        try:
            self.version = f"{name} {self._answer()['version']}"
        except BaseException:
            self.close()
            raise

    def measure(self, ids: Sequence[int], tokens: int) -> Spent:
        """Have it read a prompt and make tokens."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ids": list(ids), "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended; what it said is read next
        answer = self._answer()
        return Spent(answer["prompt"], answer["decode"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

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


def _genai(path: Path) -> list[str]:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise FlrcError("onnxruntime-genai is not installed", hint="pip install 'flrc-edge[genai]'")
    if not (path / "genai_config.json").is_file():
        raise UsageError(f"{path.name} is not a folder of onnxruntime-genai: it has no genai_config.json")
    return [sys.executable, str(_HERE / "genai_peer.py"), str(path)]


def _llama_cpp(path: Path) -> list[str]:
    """llama.cpp's llama-bench, or the npm package node-llama-cpp in this folder or one above it."""
    llama_bench = shutil.which("llama-bench")
    if llama_bench is not None:
        return [sys.executable, str(_HERE / "llama_bench_peer.py"), llama_bench, str(path)]
    node = shutil.which("node")
    if node is None:
        raise FlrcError(
            "llama.cpp is run as llama-bench or through node, and neither is on the PATH",
            hint="install llama.cpp, or Node.js 20",
        )
    place = Path("node_modules", "node-llama-cpp")
    if not any((folder / place).is_dir() for folder in (Path.cwd(), *Path.cwd().parents)):
        raise FlrcError(
            "the npm package node-llama-cpp is not installed here",
            hint="npm install --ignore-scripts node-llama-cpp",
        )
    return [node, str(_HERE / "llama_peer.mjs"), str(path)]
