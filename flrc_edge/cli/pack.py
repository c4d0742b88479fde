"""``flrc-edge pack``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flrc_edge.cli.progress_bar import from_context


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(bundle: Path, as_json: bool) -> None:
    """Make the weights of BUNDLE ready for this machine's kernels, ahead of its first use.

    They go into the user's cache, where all stages and processes map one copy. Any command that opens the bundle
    does this by itself; here it is done once, for instance while installing.
    """
    from flrc_runtime.bundle import open_bundle
    from flrc_runtime.packing import find_packed, pack

    opened = open_bundle(bundle)
    earlier = find_packed(opened.manifest) is not None
    with from_context() as progress:
        place = pack(
            opened.folder, opened.manifest, progress=lambda done, total: progress("Packing", done, total)
        )
    size = sum(f.stat().st_size for f in place.iterdir())
    if as_json:
        click.echo(json.dumps({"folder": str(place), "bytes": size, "already": earlier}))
    else:
        done = "was packed already" if earlier else "packed"
        click.echo(f"{bundle}: {done}, {size / 1e6:.1f} MB in {place}")
