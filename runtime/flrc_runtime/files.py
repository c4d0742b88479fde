"""The few file operations everything here goes through: names inside a folder, hashes, atomic writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FlrcError, FormatError, UsageError, VerificationError

MAX_JSON_BYTES = 4 * 1024 * 1024
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
    if not stat.S_ISREG(mode):
        raise VerificationError(f"{root.name}: {name} is not a regular file")
    return path


def check_name(root: Path, name: str) -> None:
    """Refuse a name that could lead out of the folder ``root``.

    Raises:
        VerificationError: It is not one path component of letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _NAME.match(name) or name in (".", ".."):
        raise VerificationError(f"{root.name}: {name!r} is not a plain file name")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def check_output_folder(target: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that could not be written, before any work is done.

    Raises:
        UsageError: It exists and ``overwrite`` is False, is a file, or its parent is missing or not writable.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} exists already", hint="choose another folder or pass --overwrite")
    if overwrite and target.exists() and any(target.iterdir()):
        _check_replaceable(target)
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not a folder that can be written")


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a folder that holds anything but what its ``flrc.json`` lists."""
    try:
        content = read_json(target / "flrc.json")
        listed = set(content["files"]) | {"flrc.json", "README.md"}
    except (FormatError, LookupError, TypeError):
        raise UsageError(f"{target} was not written by flrc-edge, so it is not overwritten") from None
    strangers = sorted(p.name for p in target.iterdir() if p.name not in listed)
    if strangers:
        raise UsageError(
            f"{target} holds {strangers[0]}, which flrc-edge did not write, so it is not overwritten"
        )


@contextmanager
def published_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside ``target`` and publish it with one rename.

    Yields:
        An empty temporary folder; when the block ends without an error it becomes ``target``, otherwise it is
        removed and an earlier ``target`` stays as it was.
    """
    check_output_folder(target, overwrite=overwrite)
    place = target.resolve()
    work = place.parent / f".{place.name}.tmp-{os.getpid()}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        yield work
        _swap(work, place)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise FlrcError(f"{target} could not be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _swap(work: Path, place: Path) -> None:
    """Move ``work`` to ``place``; what is there goes away only once the new folder has its name."""
    if not place.exists():
        work.replace(place)
        return
    old = place.parent / f".{place.name}.old-{os.getpid()}"
    place.replace(old)
    try:
        work.replace(place)
    except BaseException:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
