"""The option that every command which runs a bundle has."""

from __future__ import annotations

import click

provider_option = click.option(
    "--provider",
    "providers",
    multiple=True,
    default=("cpu",),
    metavar="NAME[:OPTIONS]",
    help="cpu, webgpu, qnn or a name of onnxruntime's, with options as qnn:soc_model=57,htp_arch=75; repeatable: a "
    "later one is used where an earlier one is not to be had.  [default: cpu]",
)
