"""Where downloaded and converted models are kept, and the lock that lets one process write at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flrc_runtime.errors import FlrcError, UsageError

ENVIRONMENT = "FLRC_EDGE_CACHE"


def cache_folder() -> Path:
    """Return the user's cache folder: $FLRC_EDGE_CACHE, else the place this platform has for caches.

    Raises:
        UsageError: It exists and is not a folder.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        folder = Path(chosen).expanduser()
    elif os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"]) / "flrc-edge"
    elif sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        folder = (Path(local) if local else Path.home() / "AppData" / "Local") / "flrc-edge" / "Cache"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "flrc-edge"
    else:
        folder = Path.home() / ".cache" / "flrc-edge"
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder", hint=f"set {ENVIRONMENT} to a folder that can be written"
        )
    return folder.absolute()


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
