"""llama.cpp's own benchmark as a peer: ``llama_bench_peer.py COMMAND GGUF THREADS CONTEXT`` (peers.py).

``llama-bench`` is run once a question, so what it measures is its own, and in turn with ours: it loads the model,
warms up, and times a prompt of random tokens and the making of tokens. Tokens are made behind a prompt of that length
where it knows ``--n-depth`` (2025), else from an empty cache, which flatters it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

NANO = 1e-9


def main() -> None:
    """Answer questions until stdin ends."""
    command, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    base = [command, "-m", path, "-r", "1", "-o", "json", *(["-t", str(threads)] if threads else [])]
    has_depth = "--n-depth" in _run([command, "--help"])
    _say({"version": f"{_test(base, prompt=1)['build_commit']} (llama-bench)"})
    for line in sys.stdin:
        question = json.loads(line)
        length, tokens = len(question["ids"]), question["tokens"]
        prompt = _test(base, prompt=length)
        depth = ["-d", str(length)] if has_depth else []
        decode = _test([*base, *depth], decode=tokens)["avg_ns"] if tokens else 0
        _say({"prompt": prompt["avg_ns"] * NANO, "decode": decode * NANO})


def _test(base: list[str], *, prompt: int = 0, decode: int = 0) -> dict[str, Any]:
    """Run one test; ``-p 0`` or ``-n 0`` leaves the other out."""
    found: list[dict[str, Any]] = json.loads(_run([*base, "-p", str(prompt), "-n", str(decode)]))
    if len(found) != 1:
        raise ValueError(f"llama-bench answered with {len(found)} tests instead of one")
    return found[0]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(said[-1] if said else f"llama-bench ended with {done.returncode}")
    return done.stdout


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        _say({"error": f"llama-bench: {str(error).splitlines()[0]}"})
        sys.exit(1)
