"""The few file operations everything here goes through: names inside a folder, hashes, atomic writes."""

from __future__ import annotations

import hashlib
import json
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
    if not _NAME.match(name) or name in (".", ".."):
        raise VerificationError(f"{root.name}: {name!r} is not a plain file name")
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
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FormatError(f"{where} is {size} bytes, more than the {MAX_JSON_BYTES} a manifest may have")
        return json.loads(
            path.read_text("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_reject_constant
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
    if overwrite and target.exists() and any(target.iterdir()) and not (target / "flrc.json").exists():
        raise UsageError(f"{target} was not written by flrc-edge, so it is not overwritten")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not a folder that can be written")


@contextmanager
def published_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside ``target`` and publish it with one rename.

    Yields:
        An empty temporary folder; when the block ends without an error it becomes ``target``, otherwise it is
        removed and an earlier ``target`` stays as it was.
    """
    check_output_folder(target, overwrite=overwrite)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = target.absolute().parent / f".{target.name}.tmp-{os.getpid()}"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    try:
        yield work
        if target.exists():
            old = target.absolute().parent / f".{target.name}.old-{os.getpid()}"
            target.replace(old)
            work.replace(target)
            shutil.rmtree(old)
        else:
            work.replace(target)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise FlrcError(f"{target} could not be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
