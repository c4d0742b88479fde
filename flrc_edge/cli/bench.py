"""``flrc-edge bench``: prompt and decode speed of every stage of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from flrc_edge.cli.progress_bar import from_context


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), default=None, help="Bundle to compare with.")
@click.option("-p", "--prompt-tokens", type=int, default=64, show_default=True, help="Tokens to read.")
@click.option("-n", "--decode-tokens", type=int, default=64, show_default=True, help="Tokens to make.")
@click.option("-r", "--repetitions", type=int, default=5, show_default=True, help="Of every test.")
@click.option("--threads", type=int, default=None, metavar="N", help="Of one operator.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Output.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def command(
    bundle: Path,
    baseline: Path | None,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    threads: int | None,
    form: str,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE reads a prompt and decodes, stage by stage and with its schedule.

    With --baseline both bundles are measured in turn in the same run, and a ratio is added.
    """
    from flrc_runtime.bench import bench
    from flrc_runtime.bench_table import as_csv, as_markdown
    from flrc_runtime.bench_table import as_json as to_json

    with from_context() as progress:
        result = bench(
            bundle,
            baseline=baseline,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repetitions=repetitions,
            threads=threads,
            progress=lambda done, total: progress("Measuring", done + 1, total + 1),
        )
    render = to_json if as_json or form == "json" else as_csv if form == "csv" else as_markdown
    click.echo(render(result))
