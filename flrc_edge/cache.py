"""The lock that lets one process at a time write what the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flrc_runtime.cache import ENVIRONMENT
from flrc_runtime.errors import FlrcError


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (created if missing) while the block runs.

    Args:
        path: The lock file; the operating system frees the lock when its holder dies.
        on_wait: Called once if another process holds it.

    Raises:
        FlrcError: The file cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire()
    except OSError as error:
        raise FlrcError(
            f"{path.parent} cannot be written: {error.strerror or error}",
            hint=f"set {ENVIRONMENT} to a folder that can be written",
        ) from None
    try:
        yield
    finally:
        lock.release()
