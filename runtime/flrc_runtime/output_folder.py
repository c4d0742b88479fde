"""Output folders: built beside their place, published with one rename, by one process at a time.

A process that is killed leaves its unfinished folder behind; the next one that writes to the same place removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .cache import cache_folder
from .errors import FlrcError, FormatError, UsageError
from .files import read_json, sync

_log = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, fs.h


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


def check_room(target: Path, need: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        target: The output folder.
        need: Bytes that it will take; what it replaces stays until then.

    Raises:
        FlrcError: There is not as much; names both.
    """
    folder = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise FlrcError(
            f"{target} needs about {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free there",
            hint="make room, or choose a folder on a larger disk",
        )


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
def claimed(target: Path) -> Iterator[None]:
    """Keep other processes from writing to ``target`` while the block runs; a process may claim it again inside.

    What a killed process left beside ``target`` is removed first; an earlier folder it had moved aside comes back.

    Raises:
        UsageError: Another process is writing there.
    """
    from filelock import FileLock, Timeout

    place = target.resolve()
    locks = cache_folder() / "locks"
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(
            locks / f"{name}.lock", is_singleton=True
        )  # the operating system frees it when we die
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = f" {(locks / f'{name}.pid').read_text().strip()}"
        raise UsageError(
            f"{target} is being written by process{holder}", hint="wait for it, or choose another folder"
        ) from None
    except OSError as error:
        _log.warning("%s cannot be written (%s): nothing keeps other processes from %s", locks, error, target)
        yield
        return
    try:
        if lock.lock_counter == 1:
            with suppress(OSError):  # it is for the message alone
                (locks / f"{name}.pid").write_text(f"{os.getpid()}\n")
            _remove_leftovers(place)
        yield
    finally:
        lock.release()


@contextmanager
def published_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside ``target`` and publish it with one rename.

    Yields:
        An empty temporary folder; when the block ends without an error it becomes ``target``, otherwise it is
        removed and an earlier ``target`` stays as it was.

    Raises:
        UsageError: ``target`` is there already, or another process is writing it.
        FlrcError: It cannot be written.
    """
    check_output_folder(target, overwrite=overwrite)
    place = target.resolve()
    work = place.parent / f".{place.name}.tmp-{os.getpid()}"
    with claimed(target):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if work.exists():
                shutil.rmtree(work)
            work.mkdir()
            yield work
            _keep(work)
            _publish(work, place)
        except OSError as error:
            free = _free(place.parent) if error.errno == errno.ENOSPC else ""
            shutil.rmtree(work, ignore_errors=True)
            raise FlrcError(f"{target} could not be written: {error.strerror or error}{free}") from error
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _free(folder: Path) -> str:
    return f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB are free there)"


def _remove_leftovers(place: Path) -> None:
    """Remove what killed processes left; the lock is held, so nobody is at work here."""
    for old in place.parent.glob(f".{place.name}.old-*"):
        if not place.exists():  # killed between two renames
            try:
                old.replace(place)
            except OSError as error:
                raise FlrcError(
                    f"{place} cannot be brought back: {error.strerror or error}", hint=f"rename {old} by hand"
                ) from None
    for pattern in ("tmp", "old"):
        for leftover in place.parent.glob(f".{place.name}.{pattern}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _keep(folder: Path) -> None:
    """Write all files of a folder to the disk itself, so that no name is published before what it names."""
    for path in [*folder.iterdir(), folder]:
        with suppress(PermissionError):  # a folder, where the system does not open those
            sync(path)


def _publish(work: Path, place: Path) -> None:
    """Move ``work`` to ``place``; what is there goes away only once the new folder has its name."""
    if not place.exists():
        work.replace(place)
    elif _exchanged(work, place):
        shutil.rmtree(work, ignore_errors=True)
    else:
        old = place.parent / f".{place.name}.old-{os.getpid()}"
        place.replace(old)
        try:
            work.replace(place)
        except BaseException:
            old.replace(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        sync(place.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system can (Linux: renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
