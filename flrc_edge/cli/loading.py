"""Open a bundle for a command; the first time on a machine its weights are packed, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.progress_bar import from_context

if TYPE_CHECKING:
    from flrc_runtime import Model


provider_option = click.option(
    "--provider",
    "providers",
    multiple=True,
    default=("cpu",),
    metavar="NAME[:OPTIONS]",
    help="cpu, webgpu, qnn or a name of onnxruntime's, with options as qnn:soc_model=57,htp_arch=75; repeatable: a "
    "later one is used where an earlier one is not to be had.  [default: cpu]",
)


def load_bundle(bundle: Path, **options: Any) -> Model:
    """Return what :func:`flrc_runtime.load` returns, showing how far packing is."""
    from flrc_runtime import load

    with from_context() as progress:
        return load(bundle, progress=lambda done, total: progress("Packing", done, total), **options)
