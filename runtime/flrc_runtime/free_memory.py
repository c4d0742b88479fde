"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


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
