"""How fast one large product of our own streams its weights: what a decode step could reach at most.

The graph is a single ``flrc.Linear`` of 4 bits whose weights, 143 MB, are mapped from a file as a bundle's are. It is
written field by field, for the runtime does without the onnx package.
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from .. import kernels

COLUMNS, ROWS, BITS = 8192, 32768, 4
_BLOCKS = COLUMNS // 32
# Tiles of 16 rows (docs/format.md): a line of 64 bytes holds the scales of four blocks, or a bit plane's part of one.
BYTES = ROWS // 16 * 64 * (_BLOCKS // 4 + _BLOCKS * BITS)
_FLOAT, _UINT8, _EXTERNAL = 1, 2, 1  # of TensorProto
_F, _INT, _INTS, _FLOATS = 1, 2, 7, 6  # of AttributeProto


def product_bandwidth(threads: int | None = None, *, repetitions: int = 15) -> float:
    """Return the bytes of weights a second that one product reads, best of several tries.

    Args:
        threads: None for onnxruntime's choice.
        repetitions: Tries, after one that does not count.

    Raises:
        FlrcError: The operator library is not there.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    kernels.register(options)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        # Of one value each, but of memory of their own: pages of zeros would be one page, read from a cache.
        (folder / "tiles.bin").write_bytes(b"\x38" * BYTES)
        (folder / "model.onnx").write_bytes(_model())
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        x = {"x": np.ones((1, 1, COLUMNS), np.float32)}
        best = 0.0
        for repetition in range(repetitions + 1):
            started = time.perf_counter()
            session.run(None, x)
            seconds = time.perf_counter() - started
            best = max(best, BYTES / seconds) if repetition else 0.0
        del session  # the file is mapped until then
    return best


def _model() -> bytes:
    """Return a ModelProto of one Linear; the numbers are of onnx.proto's fields."""
    attributes = (
        _text(1, "columns") + _number(3, COLUMNS) + _number(20, _INT),
        _text(1, "rows") + _number(8, ROWS) + _number(20, _INTS),
        # One part: of projection 0, a plane of so many bits; no pair, and so no ranks.
        _text(1, "parts") + b"".join(_number(8, n) for n in (0, BITS, 0, 0, 0, 0)) + _number(20, _INTS),
        _text(1, "scales") + _tag(7, 5) + struct.pack("<f", 1.0) + _number(20, _FLOATS),
    )
    optional = ("", "", "", "", "", "")  # residual, gate, post_norm, norm, bias, start
    node = b"".join(_text(1, name) for name in ("x", *optional, "tiles"))
    node += _text(2, "y") + _text(4, "Linear") + _text(7, "flrc")
    node += b"".join(_bytes(5, attribute) for attribute in attributes)
    place = {"location": "tiles.bin", "offset": "0", "length": str(BYTES)}
    tiles = _number(1, BYTES) + _number(2, _UINT8) + _text(8, "tiles") + _number(14, _EXTERNAL)
    tiles += b"".join(_bytes(13, _text(1, key) + _text(2, value)) for key, value in place.items())
    graph = _bytes(1, node) + _text(2, "product") + _bytes(5, tiles)
    graph += _bytes(11, _value("x", COLUMNS)) + _bytes(12, _value("y", ROWS))
    opsets = _bytes(8, _text(1, "") + _number(2, 21)) + _bytes(8, _text(1, "flrc") + _number(2, 1))
    return _number(1, 10) + _bytes(7, graph) + opsets


def _value(name: str, size: int) -> bytes:
    shape = b"".join(_bytes(1, _number(1, dimension)) for dimension in (1, 1, size))
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, shape)))


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
