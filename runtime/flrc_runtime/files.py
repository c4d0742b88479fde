"""The few file operations everything here goes through: names inside a folder, hashes, JSON read and written whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from .errors import FormatError, VerificationError

MAX_JSON_BYTES = 4 * 1024 * 1024
MAX_NAME = 255  # letters: longer ones are no file name anywhere
_NAME = re.compile(r"[A-Za-z0-9._-]+\Z")


def resolve_inside(root: Path, name: str) -> Path:
    """Return the path of a regular file named ``name`` directly inside ``root``.

    Args:
        root: The model folder.
        name: A single path component of letters, digits, ``.``, ``_`` and ``-``.

    Raises:
        VerificationError: The name is not such a component, or the file is missing, a link or not regular.
    """
    check_name(root, name)
    path = root / name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise VerificationError(
            f"{root.name}: {name} is missing", hint="export or copy the folder again"
        ) from None
    except OSError as error:
        raise VerificationError(f"{root.name}: {name} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise VerificationError(f"{root.name}: {name} is not a regular file")
    return path


def check_name(root: Path, name: str) -> None:
    """Refuse a name that could lead out of the folder ``root``.

    Raises:
        VerificationError: It is not one path component of letters, digits, ``.``, ``_`` and ``-``.
    """
    if len(name) > MAX_NAME or not _NAME.match(name) or name in (".", ".."):
        raise VerificationError(f"{root.name}: {name!r} is not a plain file name")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, reach the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read a small JSON file strictly.

    Raises:
        FormatError: The file is missing, larger than 4 MiB, not UTF-8 JSON, nested too deeply, or holds a
            duplicate key or a number that is not finite.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise FormatError(f"{where} is not a regular file")
        size = status.st_size
        if size > MAX_JSON_BYTES:
            raise FormatError(f"{where} is {size} bytes, more than the {MAX_JSON_BYTES} a manifest may have")
        return json.loads(
            path.read_text("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
            parse_float=_finite_float,
        )
    except FileNotFoundError:
        raise FormatError(f"{where} is missing", hint="is this a folder that flrc-edge wrote?") from None
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{where} cannot be read: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _reject_constant(text)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that ``path`` holds either the old or the whole new content (temporary file, fsync, replace)."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
