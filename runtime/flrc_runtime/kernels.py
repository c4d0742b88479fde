"""The operator library (runtime/kernels): found, compared with what this runtime expects, and registered."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FlrcError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

VERSION = 1  # FLRC_KERNELS_VERSION of runtime/kernels/register.c
ISAS = ("portable", "avx2", "avx_vnni", "avx512", "neon")
ENVIRONMENT = "FLRC_EDGE_ISA"
FILE = {"win32": "flrc_kernels.dll", "darwin": "flrc_kernels.dylib"}.get(sys.platform, "flrc_kernels.so")
_FOLDER = Path(__file__).parent


def library() -> Path:
    """Return the library, which is there, loads and is of this runtime's version.

    Raises:
        FlrcError: One of these does not hold.
    """
    path = _FOLDER / FILE
    _opened(path)
    return path


def isa() -> str:
    """Return the instruction set that the operators use: the best of this machine, or what ``FLRC_EDGE_ISA`` names.

    Raises:
        FlrcError: It names one that is unknown or not here, or the library cannot be used.
    """
    function = _opened(_FOLDER / FILE).flrc_kernels_isa
    function.restype = ctypes.c_char_p
    name = function()
    if isinstance(name, bytes):
        return name.decode()
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted in ISAS:
        raise FlrcError(
            f"{ENVIRONMENT} is {wanted!r}, which this machine does not have", hint=f"unset {ENVIRONMENT}"
        )
    raise FlrcError(
        f"{ENVIRONMENT} is {wanted!r}, which is no instruction set of the operators",
        hint=f"one of {', '.join(ISAS)}, or unset it",
    )


def register(options: SessionOptions) -> None:
    """Let a session that is opened with these options know the operators of the domain ``flrc``.

    Raises:
        FlrcError: The library is missing, damaged or of another version, onnxruntime refuses it, or ``FLRC_EDGE_ISA``
            names an instruction set that is not here.
    """
    isa()
    path = library()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's own, of many classes
        reason = str(error).split("] : ")[-1].split("\n")[0]
        raise FlrcError(f"onnxruntime does not take the operator library {path}: {reason}") from error


def remedy() -> str:
    """Return what brings the library that belongs to this runtime."""
    script = _FOLDER.parent / "kernels" / "build.py"
    if script.is_file():
        return f"{Path(sys.executable).name} {_shown(script)}"
    return "pip install --force-reinstall --no-deps flrc-edge"


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _opened(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise FlrcError(f"the operator library is not built: {path} is missing", hint=remedy())
    loaded = _loaded(path, path.stat().st_mtime_ns)
    try:
        version = loaded.flrc_kernels_version()
    except AttributeError:
        raise FlrcError(f"{path} is no library of flrc-edge's operators", hint=remedy()) from None
    if version != VERSION:
        raise FlrcError(
            f"the operator library {path} is of version {version}, this runtime needs {VERSION}",
            hint=remedy(),
        )
    return loaded


@cache
def _loaded(path: Path, changed: int) -> ctypes.CDLL:
    del changed  # another file of the same name is opened anew
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise FlrcError(f"the operator library cannot be loaded: {error}", hint=remedy()) from None
