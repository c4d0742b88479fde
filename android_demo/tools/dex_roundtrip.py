"""Turn the classes of an APK back into Java's, so that what a phone runs can be run here.

enjarify reads the dex code. It knows the class files of Java 7, whose interfaces have no static methods: the version is
raised here and calls of such methods get the kind of reference that a JVM asks for. A JVM has to load these classes
without its verifier (``JVM_OPTIONS``), which wants tables that dex has not. Class files: Java Virtual Machine
Specification, chapter 4.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

JVM_OPTIONS = ["-XX:+UnlockDiagnosticVMOptions", "-XX:-BytecodeVerificationRemote"]
MAGIC, JAVA_8, ACC_INTERFACE = 0xCAFEBABE, 52, 0x0200
UTF8, CLASS, METHOD, INTERFACE_METHOD = 1, 7, 10, 11
# Bytes of a constant after its tag; a long and a double count as two constants.
SIZES = {
    3: 4,
    4: 4,
    5: 8,
    6: 8,
    CLASS: 2,
    8: 2,
    9: 4,
    METHOD: 4,
    INTERFACE_METHOD: 4,
    12: 4,
    15: 3,
    16: 2,
    18: 4,
}
WIDE = (5, 6)
PLATFORM_INTERFACES = {
    "java/util/Comparator",
    "java/util/Map$Entry",
    "java/util/List",
    "java/util/Map",
    "java/util/Set",
}


@dataclass
class Constants:
    """The constant pool of a class file: where each constant begins, and where the pool ends."""

    data: bytes
    offsets: dict[int, int]
    end: int

    @classmethod
    def of(cls, data: bytes) -> Constants:
        """Find the constants of a class file.

        Raises:
            ValueError: It is not one.
        """
        if struct.unpack(">I", data[:4])[0] != MAGIC:
            raise ValueError("not a class file")
        offsets, position, index = {}, 10, 1
        while index < struct.unpack(">H", data[8:10])[0]:
            tag = data[position]
            offsets[index] = position
            size = 2 + _number(data, position + 1) if tag == UTF8 else SIZES[tag]
            position += 1 + size
            index += 2 if tag in WIDE else 1
        return cls(data, offsets, position)

    def class_name(self, index: int) -> str:
        """Return the name in a class constant."""
        text = self.offsets[_number(self.data, self.offsets[index] + 1)]
        length = _number(self.data, text + 1)
        return self.data[text + 3 : text + 3 + length].decode("utf-8", "replace")

    @property
    def own_name(self) -> str:
        """The name of this class."""
        return self.class_name(_number(self.data, self.end + 2))

    @property
    def is_interface(self) -> bool:
        """Whether this class is an interface."""
        return bool(_number(self.data, self.end) & ACC_INTERFACE)


def convert(apk: Path, target: Path) -> None:
    """Write the classes of an APK as a jar.

    Raises:
        SystemExit: enjarify is missing or fails.
    """
    if shutil.which("enjarify") is None:
        sys.exit("enjarify is missing: apt-get install enjarify")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        raw, whole = Path(scratch) / "raw.jar", Path(scratch) / "whole.jar"
        done = subprocess.run(
            ["enjarify", str(apk.resolve()), "-o", str(raw)],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": os.defpath},  # it is a module of the system's Python, not of this one
        )
        if done.returncode or ", 0 classes had errors" not in done.stdout:
            sys.exit(f"enjarify failed:\n{(done.stderr.strip() or done.stdout.strip())[-2000:]}")
        with zipfile.ZipFile(raw) as found:
            classes = {name: Constants.of(found.read(name)) for name in found.namelist()}
        interfaces = {c.own_name for c in classes.values() if c.is_interface} | PLATFORM_INTERFACES
        with zipfile.ZipFile(whole, "w") as jar:
            for name, constants in classes.items():
                jar.writestr(name, _raised(constants, interfaces))
        whole.replace(target)


def _raised(constants: Constants, interfaces: set[str]) -> bytes:
    data = bytearray(constants.data)
    data[4:8] = struct.pack(">HH", 0, JAVA_8)
    for offset in constants.offsets.values():
        if data[offset] == METHOD and constants.class_name(_number(data, offset + 1)) in interfaces:
            data[offset] = INTERFACE_METHOD
    return bytes(data)


def _number(data: bytes | bytearray, offset: int) -> int:
    return int(struct.unpack_from(">H", data, offset)[0])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: dex_roundtrip.py flrc-edge.apk classes.jar")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
