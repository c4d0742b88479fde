"""Several graphs, each with its own file of weights -> the same graphs on one file that holds equal weights once.

onnxruntime writes what it packed beside a tensor: ``prepacked_0 = "<kernel>+<hash>|offset;length;padding|…"`` in the
tensor's external data. Stages share whole tensors, so both tensors and packed blobs are found again by content.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import BinaryIO

from .errors import FormatError
from .protobuf import encoded, fields, replaced

PACKED_WEIGHTS = "packed.bin"  # in a packed folder, what its graphs know the shared file by
ALIGNMENT = 4096  # a page, so that a mapped tensor begins on one
_GRAPH, _INITIALIZER, _EXTERNAL_DATA = 7, 5, 13  # fields of ModelProto, GraphProto and TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
PREPACKED = "prepacked"


class SharedWeights:
    """A file under construction.

    Args:
        file: Where to write, from its beginning.
        name: That the graphs shall know it by.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._places: dict[bytes, int] = {}

    def move(self, graph: Path, data: Path) -> bytes:
        """Copy the weights of a graph into the file, but for those that are there.

        Args:
            graph: Whose external data all lies in ``data``.
            data: Its weights.

        Returns:
            The graph with the new places.

        Raises:
            FormatError: It is not such a graph.
        """
        with data.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            source = memoryview(mapped)
            try:
                return replaced(
                    memoryview(graph.read_bytes()),
                    _GRAPH,
                    lambda graph: replaced(
                        graph, _INITIALIZER, lambda tensor: self._tensor(tensor, source, data.name)
                    ),
                )
            finally:
                source.release()

    def _tensor(self, tensor: memoryview, source: memoryview, name: str) -> bytes:
        entries: dict[str, str] = {}
        parts: list[bytes | memoryview] = []
        for field in fields(tensor):
            if field.number == _EXTERNAL_DATA and field.value is not None:
                pair = {f.number: bytes(f.value or b"").decode() for f in fields(field.value)}
                entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
            else:
                parts.append(field.encoded)
        if not entries:
            return bytes(tensor)
        if entries.get("location") != name:
            raise FormatError(f"a tensor lies in {entries.get('location')!r}, not in {name}")
        try:
            offset, length = int(entries.get("offset", "0")), int(entries["length"])
            placed = {"location": self._name, "offset": str(self._put(source, offset, length))}
            placed["length"] = str(length)
            for key, value in entries.items():
                if key.startswith(PREPACKED):
                    placed[key] = self._packed(value, source)
        except (KeyError, ValueError) as error:
            raise FormatError(f"the external data of a tensor is damaged: {error}") from None
        for key, value in placed.items():
            entry = encoded(_KEY, key.encode()) + encoded(_VALUE, value.encode())
            parts.append(encoded(_EXTERNAL_DATA, entry))
        return b"".join(parts)

    def _packed(self, value: str, source: memoryview) -> str:
        kernel, *blobs = value.split("|")
        moved = []
        for blob in blobs:
            offset, length, padding = (int(part) for part in blob.split(";"))
            moved.append(f"{self._put(source, offset, length)};{length};{padding}")
        return "|".join([kernel, *moved])

    def _put(self, source: memoryview, offset: int, length: int) -> int:
        """Return where these bytes are in the file, written there if they were not."""
        if not 0 <= offset <= offset + length <= len(source):
            raise ValueError(f"bytes {offset} to {offset + length} of {len(source)}")
        content = source[offset : offset + length]
        key = hashlib.blake2b(content, digest_size=32).digest() + length.to_bytes(8, "little")
        if key not in self._places:
            place = self._file.tell()
            place += -place % ALIGNMENT
            self._file.write(b"\0" * (place - self._file.tell()))
            self._file.write(content)
            self._places[key] = place
        return self._places[key]
