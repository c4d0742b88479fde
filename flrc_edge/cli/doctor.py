"""``flrc-edge doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from flrc_edge.cli.stage_text import wants_color

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(ctx: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Look at this machine: versions, processors, memory, cache, providers, operators; whether BUNDLE, if given, runs.

    Exits with 1 if something will not work.
    """
    from flrc_runtime.diagnosis import diagnose

    found = []
    for finding in diagnose(bundle):
        found.append(finding)
        if not as_json:
            level = finding.level.ljust(8)
            shown = click.style(level, fg=_COLORS[finding.level]) if wants_color(sys.stdout) else level
            click.echo(f"{shown} {finding.topic}: {finding.text}", color=True)
            if finding.remedy:
                click.echo(f"         {finding.remedy}")
    if as_json:
        click.echo(json.dumps([asdict(f) for f in found], indent=1, ensure_ascii=False))
    if any(f.level == "problem" for f in found):
        ctx.exit(1)
