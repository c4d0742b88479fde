"""How fast this machine's memory gives what a decode step reads."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_SIZE = 2**25  # float32 values, 134 MB: several times a last-level cache


def memory_bandwidth(threads: int | None = None, *, repetitions: int = 5) -> float:
    """Return the bytes a second that threads read from memory one after the other, best of several tries.

    Args:
        threads: None for as many as processors.
        repetitions: Tries.
    """
    count = threads or os.cpu_count() or 1
    parts = np.array_split(np.ones(_SIZE, np.float32), count)
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(repetitions + 1):  # the first wakes the threads
            started = time.perf_counter()
            list(
                pool.map(np.max, parts)
            )  # SIMD, without the interpreter's lock; adding is slower than memory
            best = max(best, 4 * _SIZE / (time.perf_counter() - started))
    return best
