"""``flrc-edge verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flrc_runtime import manifest


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(folder: Path, as_json: bool) -> None:
    """Compare every file of the checkpoint or bundle FOLDER with its checksum; exit 3 if one differs."""
    content = manifest.verify(folder)
    size = sum(f.size for f in content.files.values())
    if as_json:
        click.echo(
            json.dumps({"folder": str(folder), "files": len(content.files), "bytes": size, "ok": True})
        )
    else:
        click.echo(f"{folder}: {len(content.files)} files, {size / 1e6:.1f} MB, all as written")
