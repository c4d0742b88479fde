"""``flrc-edge push``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flrc_edge.cli.hub_progress import file_lines, quiet_bars
from flrc_edge.hub_repository import local_listing, push


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="A repository that is made now is private.")
@click.option("--revision", metavar="BRANCH", default=None, help="Branch, made if missing (the main one).")
@click.option("--message", default=None, help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; the network is not used.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload the checkpoint or bundle FOLDER to a Hugging Face hub, in one commit.

    Every file is compared with its checksum first, and only what flrc.json lists is uploaded, and README.md, the model
    card. `hf auth login` (or HF_TOKEN) says who you are; HF_ENDPOINT names another hub.
    """
    listing = local_listing(folder, repository)
    address = None
    if not dry_run:
        quiet = quiet_bars(ctx)
        if not quiet:
            click.echo(f"Uploading {len(listing.files)} files, {listing.bytes / 1e6:,.1f} MB …", err=True)
        address = push(listing, private=private, revision=revision, message=message)
    if as_json:
        found = {"repository": repository, "files": listing.files, "bytes": listing.bytes, "commit": address}
        click.echo(json.dumps(found, indent=1))
        return
    if dry_run:
        file_lines(listing)
        click.echo(f"{listing.kind} of {listing.bytes / 1e6:,.1f} MB would be uploaded to {repository}")
        return
    click.echo(f"{folder} is in {address}")
    click.echo(f"Anyone who may read it: flrc-edge pull {repository}")
