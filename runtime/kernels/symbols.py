"""What a built library is for, shows and needs, read from its bytes: ELF, Mach-O or PE, 64 bits, little endian."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

JAVA = "Java_dev_flrc_engine_decode_Kernels_version"
EXPORTS = frozenset({"RegisterCustomOps", "flrc_kernels_version", "flrc_kernels_isa", JAVA})
_MACHINES = {62: "x86_64", 183: "aarch64", 0x01000007: "x86_64", 0x0100000C: "aarch64", 0x8664: "x86_64"}

_LINKERS = {"_mh_dylib_header", "__dso_handle"}  # in every library of macOS


@dataclass(frozen=True)
class Symbols:
    """What was read.

    Args:
        kind: ``elf``, ``mach-o`` or ``pe``.
        machine: ``x86_64`` or ``aarch64``; something else is an error.
        exports: Names that others can call.
        glibc: The newest version of glibc that is asked for; ``(0, 0)``: none.
    """

    kind: str
    machine: str
    exports: frozenset[str]
    glibc: tuple[int, int] = (0, 0)


def read(data: bytes) -> Symbols:
    """Read a library.

    Raises:
        ValueError: It is none of these.
    """
    try:
        if data[:6] == b"\x7fELF\x02\x01":
            return _elf(data)
        if data[:4] == b"\xcf\xfa\xed\xfe":
            return _macho(data)
        if data[:2] == b"MZ":
            return _pe(data)
    except (struct.error, IndexError, KeyError, StopIteration) as error:
        raise ValueError(f"the library is damaged: {error}") from None
    raise ValueError("it is no library of ELF, Mach-O or PE")


def _text(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()


def _elf(data: bytes) -> Symbols:
    (machine,) = struct.unpack_from("<H", data, 18)
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, start + i * size) for i in range(count)]
    symbols = next(s for s in sections if s[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]]
    exports = set()
    for place in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", data, place)
        if section and info >> 4:  # defined, and not local
            exports.add(_text(data, names[4] + name))
    table = data[names[4] : names[4] + names[5]]
    needed = [(int(a), int(b)) for a, b in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", table)]
    return Symbols("elf", _MACHINES[machine], frozenset(exports), max(needed, default=(0, 0)))


def _macho(data: bytes) -> Symbols:
    (machine,) = struct.unpack_from("<I", data, 4)
    (commands,) = struct.unpack_from("<I", data, 16)
    exports: set[str] = set()
    place = 32
    for _ in range(commands):
        kind, size = struct.unpack_from("<II", data, place)
        if kind == 2:  # LC_SYMTAB
            symbols, count, names, _ = struct.unpack_from("<IIII", data, place + 8)
            for i in range(count):
                name, flags = struct.unpack_from("<IB", data, symbols + 16 * i)
                if flags & 0xFF & ~0x10 == 0x0F and not flags & 0x10:  # external, in a section, not private
                    exports.add(_text(data, names + name).removeprefix("_"))
        place += size
    return Symbols("mach-o", _MACHINES[machine], frozenset(exports - _LINKERS))


def _pe(data: bytes) -> Symbols:
    (header,) = struct.unpack_from("<I", data, 60)
    machine, sections = struct.unpack_from("<HH", data, header + 4)
    (optional,) = struct.unpack_from("<H", data, header + 20)
    table = header + 24 + optional
    # Where a section's bytes are in memory and in the file.
    places = [struct.unpack_from("<IIII", data, table + 40 * i + 8) for i in range(sections)]

    def at(address: int) -> int:
        return next(
            int(address - start + raw) for size, start, _, raw in places if 0 <= address - start < size
        )

    (directory,) = struct.unpack_from("<I", data, header + 24 + 112)
    (count,) = struct.unpack_from("<I", data, at(directory) + 24)
    (names,) = struct.unpack_from("<I", data, at(directory) + 32)
    addresses = struct.unpack_from(f"<{count}I", data, at(names))
    return Symbols("pe", _MACHINES[machine], frozenset(_text(data, at(a)) for a in addresses))
