"""Lets the n-th file operation below a folder fail, whoever does it: the interpreter's audit hooks see them all.

What Rust writes (safetensors) and ``os.fsync`` raise no audit event; these are wrapped.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
_current: Injection | None = None


class Injection:
    """Counts operations that write below a folder while it is entered, and lets one of them fail.

    Args:
        fails: Number of the operation that fails with "No space left on device", from 1; None for none.
        folder: Operations elsewhere are left alone.
    """

    def __init__(self, fails: int | None, folder: Path) -> None:
        self.count = 0
        self._fails = fails
        self._folder = str(folder)

    def __enter__(self) -> Injection:
        global _current
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None

    def operation(self, path: Any) -> None:
        """Count one operation on a path; fail if it is the one."""
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(self._folder):
            return
        self.count += 1
        if self.count == self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _current is None or event not in _EVENTS:
        return
    if event == "open":
        _, mode, flags = arguments
        writes = (
            any(c in mode for c in "wax+")
            if isinstance(mode, str)
            else bool(flags & (os.O_WRONLY | os.O_RDWR))
        )
        if not writes:
            return
    _current.operation(arguments[0])


def _wrapped(function: Any, place: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if _current is not None:
            _current.operation(place(arguments))
        return function(*arguments, **options)

    return call


def _of_descriptor(arguments: tuple[Any, ...]) -> str:
    return str(Path(f"/proc/self/fd/{arguments[0]}").readlink())


def install() -> None:
    """Wrap what raises no audit event, wherever it was imported to, and add the hook. It cannot be removed again."""
    save = safetensors.torch.save_file
    wrapped = _wrapped(save, lambda arguments: arguments[1])
    for module in list(sys.modules.values()):
        if (
            getattr(module, "__dict__", {}).get("save_file") is save
        ):  # no module that makes its names when asked
            module.save_file = wrapped  # type: ignore[attr-defined]
    os.fsync = _wrapped(os.fsync, _of_descriptor)
    sys.addaudithook(_hook)
