"""What ``push`` and ``pull`` show of files that go to a hub or come from one."""

from __future__ import annotations

import sys

import click

from flrc_edge.hub_repository import Listing


def quiet_bars(ctx: click.Context) -> bool:
    """Leave the bars of the hub's client to a terminal; return whether nothing shall be shown at all (``--quiet``)."""
    quiet = bool(ctx.find_root().params.get("quiet"))
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    return quiet


def file_lines(listing: Listing) -> None:
    """Print every file with its size."""
    width = max(map(len, listing.files))
    for name, size in listing.files.items():
        click.echo(f"{name:{width}}  {size / 1e6:>10,.3f} MB")
