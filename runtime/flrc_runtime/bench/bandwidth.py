"""How many bytes a decode step reads, and how fast this machine's memory gives them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..protobuf import fields

# Fields of ModelProto, GraphProto, NodeProto, TensorProto and StringStringEntryProto.
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_NODE_INPUT, _OP_TYPE = 1, 4
_NAME, _EXTERNAL_DATA, _KEY, _VALUE = 8, 13, 1, 2
_LOOKUPS = ("Gather", "GatherBlockQuantized")  # read one row of many
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


def step_bytes(graph: Path) -> int:
    """Return the bytes of weights that one decode step of a stage reads.

    Every tensor outside the graph file that some node reads whole; an embedding that only gives a row is not one.

    Args:
        graph: The stage as exported (not packed).

    Raises:
        FormatError: It is damaged.
    """
    sizes: dict[str, int] = {}
    read: set[str] = set()
    for part in fields(memoryview(graph.read_bytes())):
        if part.number != _GRAPH or part.value is None:
            continue
        for field in fields(part.value):
            if field.value is None:
                continue
            if field.number == _NODE:
                operator, inputs = _node(field.value)
                if operator not in _LOOKUPS:
                    read.update(inputs)
            elif field.number == _INITIALIZER:
                name, size = _tensor(field.value)
                sizes[name] = size
    return sum(size for name, size in sizes.items() if name in read)


def _node(node: memoryview) -> tuple[str, list[str]]:
    operator, inputs = "", []
    for field in fields(node):
        if field.number == _OP_TYPE and field.value is not None:
            operator = bytes(field.value).decode()
        elif field.number == _NODE_INPUT and field.value is not None:
            inputs.append(bytes(field.value).decode())
    return operator, inputs


def _tensor(tensor: memoryview) -> tuple[str, int]:
    """Return name and bytes of a tensor, 0 if it lies in the graph file."""
    name, size = "", 0
    for field in fields(tensor):
        if field.number == _NAME and field.value is not None:
            name = bytes(field.value).decode()
        elif field.number == _EXTERNAL_DATA and field.value is not None:
            pair = {f.number: bytes(f.value or b"").decode() for f in fields(field.value)}
            if pair.get(_KEY) == "length":
                size = int(pair[_VALUE])
    return name, size
