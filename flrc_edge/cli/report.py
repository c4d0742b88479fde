"""``flrc-edge report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.errors import FlrcError, UsageError
from flrc_runtime import manifest
from flrc_runtime.files import read_json


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page; an earlier report is replaced, any other file is not.",
)
@click.option(
    "--png", type=click.Path(path_type=Path), help="Put the figures as PNG files into this folder, too."
)
@click.option(
    "--measure",
    is_flag=True,
    help="Measure perplexity and, of a bundle, speed, memory and sample answers, too.",
)
@click.option("--dense", metavar="MODEL", help="With --measure: the dense model, for divergence.")
@click.option("--windows", type=int, default=4, show_default=True, help="With --measure: of each text.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="With --measure: to answer (repeatable)."
)
@click.option("--threads", type=int, default=None, metavar="N", help="With --measure: of one operator.")
@click.option("--json", "as_json", is_flag=True, help="Print the names of the written files as JSON.")
def command(
    folder: Path,
    output: Path,
    png: Path | None,
    measure: bool,
    dense: str | None,
    windows: int,
    prompts: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Draw what is known of the checkpoint or bundle FOLDER into one self-contained HTML page.

    It shows the Fisher score of every projection and layer, what each rank costs, the share of parameters each keeps at
    every stage, and the divergence the schedule was chosen by, with their numbers. --measure adds how good, fast and
    large every stage is, and answers coloured by stage. Needs matplotlib: pip install 'flrc-edge[report]'.
    """
    content = manifest.read(folder)
    _check_targets(folder, output, png)
    if not measure and (dense is not None or prompts or threads is not None):
        raise UsageError("--dense, --prompt and --threads are for what is measured", hint="add --measure")

    from flrc_edge.figures.canvas import check_matplotlib, render
    from flrc_edge.rank_report import rank_report

    check_matplotlib()
    measured = None
    if measure:
        from flrc_edge.stage_report import measure_stages

        with from_context() as progress:
            measured = measure_stages(
                folder,
                content.kind,
                dense=dense,
                windows=windows,
                prompts=prompts,
                threads=threads,
                progress=progress,
            )
    with from_context() as progress:
        report = rank_report(content, measured=measured, progress=progress, **_kept_beside(folder, content))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report.html, "utf-8")
        written = [output]
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for name, figure in report.figures.items():
                written.append(png / f"{name}.png")
                written[-1].write_bytes(render(figure, "png"))
    except OSError as error:
        raise FlrcError(f"{error.filename} could not be written: {error.strerror}") from None
    if as_json:
        click.echo(json.dumps({"html": str(output), "png": [str(path) for path in written[1:]]}))
    else:
        for path in written:
            click.echo(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def _kept_beside(folder: Path, content: manifest.Manifest) -> dict[str, Any]:
    """Return what a checkpoint's other JSON files hold for a report."""
    from flrc_edge import loss_curves

    found: dict[str, Any] = {}
    if loss_curves.FILE_NAME in content.files:
        found["curves"] = loss_curves.read_curves(folder)
    if "healing.json" in content.files:
        found["healing"] = read_json(folder / "healing.json")["runs"]
    return found


def _check_targets(folder: Path, output: Path, png: Path | None) -> None:
    """Refuse to spoil the folder itself, whose files are all listed, or somebody's file."""
    from flrc_edge.html_report import MARK

    for target in (output.parent, png):
        if target is not None and target.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{folder} holds only what it lists, so the report must not go into it",
                hint="name a place with -o",
            )
    if output.exists() and not _is_report(output, MARK):
        raise UsageError(
            f"{output} exists and is not a report of flrc-edge", hint="choose another file with -o"
        )


def _is_report(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(200)
