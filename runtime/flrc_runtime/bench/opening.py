"""Opens a bundle in this process and answers once: ``opening.py QUESTION`` prints two lines of JSON (loading.py).

The first one appears with the first token; it is a script, so that nothing is imported but what that takes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: F401 - before memory is looked at

from flrc_runtime import load

PROMPT = 8
ANSWER = 96  # tokens, in equal parts of every opened stage
_ROLLUP = Path("/proc/self/smaps_rollup")


def main() -> None:
    """Open, answer, and say what it took."""
    asked = json.loads(sys.argv[1])
    stages: list[int] = asked["stages"]
    before = memory() if asked["memory"] else {}
    started = time.perf_counter()
    model = load(asked["folder"], stages=(), threads=asked["threads"])
    opened = time.perf_counter()
    for stage in stages:
        model.sessions.get(stage)
    ready = time.perf_counter()
    after = memory() if asked["memory"] else {}
    ids = np.random.default_rng(0).integers(0, model.manifest.model.vocab_size, PROMPT).tolist()
    decoder = model.decoder()
    token = int(decoder.prefill(ids, stages[0]).argmax())
    print(json.dumps({"open": ready - started, "sessions": ready - opened}), flush=True)
    for stage in stages:
        for _ in range(ANSWER // len(stages)):
            token = int(decoder.step(token, stage).argmax())
    used = memory() if asked["memory"] else {}
    found = {
        "loaded": after.get("Pss", 0) - before.get("Pss", 0),
        "used": used.get("Pss", 0) - before.get("Pss", 0),
        "private": used.get("Pss_Anon", 0) - before.get("Pss_Anon", 0),
        "process": used.get("Pss", 0),
    }
    cache = model.sessions.kv_shape.bytes_for(decoder.length)
    print(json.dumps({"cache": cache, **(found if used else {})}), flush=True)


def memory() -> dict[str, int]:
    """Return this process's memory by kind in bytes; nothing where /proc does not tell."""
    try:
        lines = _ROLLUP.read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


if __name__ == "__main__":
    main()
