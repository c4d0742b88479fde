"""Give memory back to the system: heap that was freed, and pages of a file that were only looked at."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from io import RawIOBase
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

_PROCESS = Path("/proc/self")
_DONTNEED = 4  # of madvise
_OF_FILE = 61  # bit of an entry of /proc/self/pagemap; above it: swapped out, and present
_CLEAN = np.array([0, 1, 0b101], np.uint64)  # nothing there, or a page of the file, untouched or read


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def trim() -> None:
    """Have the C library return freed heap pages, where it is glibc; elsewhere do nothing.

    onnxruntime reads a graph into many small objects and frees most of them, which leaves holes in the heap that
    glibc keeps: 25 MB after opening three stages of SmolLM2-135M.
    """
    trim_heap = getattr(_libc(), "malloc_trim", None)
    if trim_heap is not None:
        trim_heap(ctypes.c_size_t(0))


def let_go(file: Path) -> None:
    """Take the pages of a mapped file out of this process; each comes back, from the system's cache, when it is read.

    Where pages were written to they all stay. Elsewhere than on Linux, do nothing.

    Args:
        file: An absolute path without links.
    """
    madvise = getattr(_libc(), "madvise", None)
    if madvise is None:
        return
    try:
        regions = _mapped(file)
        with (_PROCESS / "pagemap").open("rb", buffering=0) as pages:
            entries = b"".join(_of_region(pages, first, end) for first, end in regions)
    except OSError:
        return
    kinds = np.frombuffer(entries, np.uint64) >> np.uint64(_OF_FILE)
    if (
        len(kinds) * PAGESIZE != sum(end - first for first, end in regions)
        or not np.isin(kinds, _CLEAN).all()
    ):
        return
    for first, end in regions:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONTNEED)


def _of_region(pages: RawIOBase, first: int, end: int) -> bytes:
    """Return what /proc/self/pagemap says of a part of memory, 8 bytes a page."""
    pages.seek(first // PAGESIZE * 8)
    return pages.read((end - first) // PAGESIZE * 8) or b""


def _mapped(file: Path) -> list[tuple[int, int]]:
    """Return from where to where this process's memory is a file; parts that touch are one."""
    found: list[tuple[int, int]] = []
    end_of_line = f" {file}"
    for line in os.fsdecode((_PROCESS / "maps").read_bytes()).split("\n"):  # in the order of addresses
        if not line.endswith(end_of_line):
            continue
        first, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, end))
    return found
