"""Hatchling's hook: builds the operator library (runtime/kernels/build.py) and puts it into the wheel.

An editable install has it in the source folder. FLRC_EDGE_PLATFORM names another platform to build a wheel for.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "runtime"))
from kernels import build as kernels

sys.path.pop(0)


class KernelsHook(BuildHookInterface[Any]):
    """Brings the library of one platform."""

    def dependencies(self) -> list[str]:
        """Ask for a compiler where there is none, or where another platform is asked for."""
        if kernels.zig() is not None or (not _platform() and kernels.native_compiler() is not None):
            return []
        return ["ziglang>=0.14"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library before the wheel is written."""
        name = _platform()
        try:
            if version == "editable":
                if not kernels.is_fresh(kernels.PACKAGE / kernels.this_machine().file):
                    kernels.build()
                return
            self._scratch = tempfile.TemporaryDirectory()
            library = kernels.build(Path(self._scratch.name), name)
        except kernels.BuildError as error:
            self.app.abort(f"Error: {error}")
        to = kernels.PLATFORMS[name] if name else kernels.this_machine()
        tag = to.tag or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        build_data["force_include"][str(library)] = f"flrc_runtime/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built for the wheel alone."""
        del version, build_data, artifact_path
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _platform() -> str | None:
    name = os.environ.get("FLRC_EDGE_PLATFORM") or None
    if name is not None and name not in kernels.PLATFORMS:
        sys.exit(f"Error: FLRC_EDGE_PLATFORM is {name!r}, not one of {', '.join(kernels.PLATFORMS)}")
    return name
