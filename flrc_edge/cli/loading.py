"""Open a bundle for a command; the first time on a machine its weights are packed, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flrc_edge.cli.progress_bar import from_context

if TYPE_CHECKING:
    from flrc_runtime import Model


def load_bundle(bundle: Path, **options: Any) -> Model:
    """Return what :func:`flrc_runtime.load` returns, showing how far packing is."""
    from flrc_runtime import load

    with from_context() as progress:
        return load(bundle, progress=lambda done, total: progress("Packing", done, total), **options)
