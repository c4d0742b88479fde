"""The header of a GGUF file: metadata, and where the tensors lie (versions 2 and 3, little-endian).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here and not by the ``gguf`` package,
whose reader takes types it does not know, and other versions and byte orders, for damage.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flrc_runtime.errors import FormatError, UnsupportedModelError

_DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, OSError, MemoryError)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; ``shape`` as numpy has it (rows first), ``offset`` in bytes of the file."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; arrays in ``fields`` are lists."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        FormatError: The file is truncated or not GGUF.
        UnsupportedModelError: It is of another version or byte order.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(
                f"{path.name} is not a GGUF file", hint="give a GGUF file or a Hugging Face folder"
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_version(path, _Cursor(data, 4).scalar("I"))
                return _read(path, _Cursor(data, 8))
        except _DAMAGED as error:
            raise FormatError(
                f"{path.name} is truncated or damaged ({error})", hint="download the file again"
            ) from None


def _check_version(path: Path, version: int) -> None:
    if version & 0xFFFF == 0 and version:
        raise UnsupportedModelError(
            f"{path.name} is a big-endian GGUF file, which is not read",
            hint="turn it over with `gguf-convert-endian FILE little` of the gguf package",
        )
    if version not in _VERSIONS:
        raise UnsupportedModelError(
            f"{path.name} is of GGUF version {version}; the versions {_VERSIONS[0]} and {_VERSIONS[1]} are read",
            hint="convert the model again with a recent llama.cpp" if version < 2 else None,
        )


class _Cursor:
    """Reads values one after the other; nothing may reach past the end of the file."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data, self.position, self._size = data, position, len(data)

    def _take(self, size: int) -> int:
        start = self.position
        if size > self._size - start:
            raise ValueError("it ends within its header")
        self.position = start + size
        return start

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self._data, self._take(size))[0]

    def string(self, errors: str = "replace") -> str:
        length = self.scalar("Q")
        start = self._take(length)
        return self._data[start : start + length].decode("utf-8", errors)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > self._size:
            raise ValueError(f"an array of {count} values")
        if kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}")
            start = self._take(count * size)
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, start))
        if kind == _STRING:  # tokens: what is not UTF-8 has to be found out later, not replaced
            return [self.string("surrogateescape") for _ in range(count)]
        return [self.value(kind) for _ in range(count)]


def _read(path: Path, cursor: _Cursor) -> GgufHeader:
    n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string()
        if key in fields:
            raise ValueError(f"{key} is there twice")
        fields[key] = cursor.value(cursor.scalar("I"))
    found = []
    for _ in range(n_tensors):
        name, n_dimensions = cursor.string(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(n_dimensions))
        found.append(GgufTensor(name, cursor.scalar("I"), shape[::-1], cursor.scalar("Q")))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {t.name: GgufTensor(t.name, t.type_number, t.shape, start + t.offset) for t in found}
    if len(tensors) != len(found):
        raise ValueError("two tensors of one name")
    return GgufHeader(path, fields, tensors)
