"""Other programs that decode the same model, by their names on the command line."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .genai import Genai
from .llama_bench import LlamaBench

Peer = Genai | LlamaBench
NAMES = ("genai", "llama.cpp")


def open_peer(name: str, path: Path, *, threads: int | None) -> list[Peer]:
    """Open what a peer is measured as: llama.cpp with one thread, too, which on two cores may be its best.

    Args:
        name: ``genai`` or ``llama.cpp``.
        path: What it opens: a folder of onnxruntime-genai, a GGUF file.
        threads: Of one operator; None for the peer's choice.

    Raises:
        UsageError: There is no such peer or file.
        FlrcError: It is not installed, or does not open the file.
    """
    if name not in NAMES:
        raise UsageError(f"{name!r} is not a peer", hint=f"peers: {', '.join(NAMES)}")
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if name == "genai":
        return [Genai(path, threads=threads)]
    counts = [threads] if threads == 1 else [threads, 1]
    return [LlamaBench(path, threads=count) for count in counts]
