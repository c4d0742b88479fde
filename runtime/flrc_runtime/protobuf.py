"""Just enough of the protobuf wire format to change a few fields of a message and leave all others as they are.

The packed graphs need new offsets in their external data and nothing else; the onnx package, which has a class for
every message, would bring itself and protobuf onto every phone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .errors import FormatError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are not used by ONNX


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: Of the field.
        value: Payload of a field of bytes (string, message); None for a number.
        encoded: The field as it stands in the message, tag included.
    """

    number: int
    value: memoryview | None
    encoded: memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in order.

    Raises:
        FormatError: It is cut off or not protobuf.
    """
    start, end = 0, len(message)
    while start < end:
        tag, at = _varint(message, start)
        wire = tag & 7
        value = None
        if wire == VARINT:
            _, stop = _varint(message, at)
        elif wire == BYTES:
            size, at = _varint(message, at)
            stop = at + size
            value = message[at:stop]
        elif wire in (FIXED64, FIXED32):
            stop = at + (8 if wire == FIXED64 else 4)
        else:
            raise FormatError(f"a protobuf field of type {wire} is not known")
        if stop > end or tag >> 3 == 0:
            raise FormatError("a protobuf message is damaged")
        yield Field(tag >> 3, value, message[start:stop])
        start = stop


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at ``at`` and where it ends."""
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise FormatError("a protobuf message is damaged")
