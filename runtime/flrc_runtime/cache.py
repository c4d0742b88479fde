"""Where things that can be made again are kept on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import UsageError

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
