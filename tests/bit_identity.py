"""What logits a bundle gives, for one instruction set: ``python -m tests.bit_identity FOLDER IDS STAGES``.

IDS and STAGES are JSON, a stage a token. The tokens go through the bundle whole, in chunks and one by one, with 1 to 4
threads; what is printed is the SHA-256 of every different result, so one line if all are equal to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flrc_runtime import load
from flrc_runtime.kernels import ENVIRONMENT

ROOT = Path(__file__).parents[1]
CHUNKS = (1, 7, 64, 1 << 20)  # the last one: whole, as far as one stage reads
THREADS = (1, 2, 3, 4)


def results(folder: Path, ids: Sequence[int], stages: Sequence[int]) -> list[str]:
    """Return the SHA-256 of every different result."""
    found = set()
    for threads in THREADS:
        model = load(folder, threads=threads)
        for chunk in CHUNKS if threads in (1, THREADS[-1]) else CHUNKS[:1]:
            found.add(hashlib.sha256(model.logits(ids, stages=stages, chunk=chunk).tobytes()).hexdigest())
    return sorted(found)


def results_on(isa: str, folder: Path, ids: Sequence[int], stages: Sequence[int]) -> list[str]:
    """Return the same of another instruction set, in a process of its own."""
    command = [sys.executable, "-m", "tests.bit_identity", folder, json.dumps(ids), json.dumps(stages)]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {ENVIRONMENT: isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (isa, done.stderr[-2000:])
    return done.stdout.split()


if __name__ == "__main__":
    print(*results(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])), sep="\n")
