"""The packages that an exported folder was written with."""

from __future__ import annotations

from importlib.metadata import version

from flrc_runtime.manifest import Manifest

_PACKAGES = ("flrc-edge", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def export_versions(checkpoint: Manifest) -> dict[str, str]:
    """Return the versions that wrote a checkpoint, and those of the packages that export it now."""
    return {**checkpoint.versions, **{name: version(name) for name in _PACKAGES}}
