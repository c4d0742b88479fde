"""``flrc-edge demo``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import parse_keeps
from flrc_edge.cli.stage_text import StageText, printable, wants_color
from flrc_edge.errors import EmptyPromptError, UsageError

if TYPE_CHECKING:
    from flrc_edge.demo import Summary
    from flrc_runtime import Token


SHOWN_EACH = 32  # answer tokens a stage computes


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("flrc-demo"), show_default=True)
@click.option(
    "--model", default="smollm2-135m", show_default=True, help="Built-in name, folder, GGUF or hub id."
)
@click.option(
    "--stages", default=".95,.9,.85", show_default=True, metavar="K,K,…", help="Keep of each stage."
)
@click.option("--dtype", type=click.Choice(["fp32", "int8", "int4"]), default="int8", show_default=True)
@click.option("--tokens", default=16384, show_default=True, help="Calibration tokens.")
@click.option("--prompt", default=None, help="The question to answer.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of the answer, at most.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Put the figures into this JSON file and its .md page."
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of the report.")
def command(
    output: Path,
    model: str,
    stages: str,
    dtype: Any,
    tokens: int,
    prompt: str | None,
    max_tokens: int,
    overwrite: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """Take a real model the whole way: compress, export, measure, and stream an answer through its stages."""
    keeps = parse_keeps(stages)
    if prompt is not None and not prompt.strip():
        raise EmptyPromptError("the prompt is empty")
    _check_output(output, overwrite=overwrite)

    from flrc_edge.builtin_models import BUILTIN
    from flrc_edge.demo import PROMPT, run
    from flrc_edge.models import open_model
    from flrc_edge.pull import is_pulled, pull
    from flrc_edge.report import save as save_figures
    from flrc_edge.settings import Settings

    # Set by hand so that the answer shows every stage; compress measures whether and when moving on pays.
    shown = tuple(SHOWN_EACH * i for i in range(1, len(keeps)))
    settings = Settings(keep=keeps, tokens=tokens, boundaries=shown, storage="plain")
    if model in BUILTIN and not is_pulled(model):
        pull(model)
    loaded = open_model(model)
    output.mkdir(parents=True, exist_ok=True)
    prompt = PROMPT if prompt is None else prompt
    dense, staged = _Writer(as_json), _Writer(as_json)
    with from_context() as progress:
        summary = run(
            loaded,
            output,
            settings,
            dtype=dtype,
            prompt=prompt,
            max_tokens=max_tokens,
            overwrite=overwrite,
            progress=progress,
            show_dense=lambda t: dense.show(t, f"\n> {prompt}\n\ndense: "),
            show=lambda t: staged.show(t, "\n\nstages: ", StageText(color=wants_color(sys.stdout))),
        )
    if save is not None:
        save_figures(save, "demo", summary.model, asdict(summary))
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=1, ensure_ascii=False))
        return
    click.echo("\n")
    for line in report(summary):
        click.echo(line)
    click.echo(f"\nWritten: {output / 'summary.json'}, {output / 'checkpoint'}, {output / 'bundle'}")
    click.echo(f'Next: flrc-edge generate {output / "bundle"} "{prompt}" --show-stages')


class _Writer:
    """Streams one answer to stdout behind a heading."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent
        self._marks: StageText | None = None
        self._started = False

    def show(self, token: Token, heading: str, marks: StageText | None = None) -> None:
        if self._silent:
            return
        if not self._started:
            self._started, self._marks = True, marks
            click.echo(heading, nl=False)
        text = printable(token.text)
        click.echo(self._marks.piece(text, token.stage) if self._marks else text, nl=False, color=True)


def report(summary: Summary) -> list[str]:
    """Return the lines of the closing table."""
    counts = [summary.stage_of_token.count(s) for s in range(len(summary.stages))]
    dense = summary.dense
    lines = [
        f"{summary.model}, {summary.dtype}, {len(summary.stage_of_token)} answer tokens; "
        f"perplexity on held-out text, speed on this machine",
        f"{'':10}{'keep':>7}{'perplexity':>12}{'ms/token':>10}{'MB/token':>10}{'tokens':>8}",
        f"{'dense':10}{1:>7.3f}{dense.ppl:>12.2f}{dense.ms_per_token:>10.2f}{dense.bytes / 1e6:>10.1f}{'':>8}",
    ]
    lines += [
        f"{f'stage {i}':10}{s.keep:>7.3f}{s.ppl:>12.2f}{s.ms_per_token:>10.2f}{s.bytes / 1e6:>10.1f}{counts[i]:>8}"
        for i, s in enumerate(summary.stages)
    ]
    total = sum(summary.seconds.values())
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary.seconds.items() if seconds >= 0.5)
    return [*lines, f"bundle {summary.bundle_bytes / 1e6:.1f} MB; {total:.0f} s in all ({phases})"]


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds anything but an earlier demo."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} exists and is not a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{output} exists already", hint="choose another folder or pass --overwrite")
    strangers = {p.name for p in output.iterdir()} - {"checkpoint", "bundle", "summary.json"}
    if strangers:
        raise UsageError(f"{output} holds {min(strangers)}, which no demo wrote, so it is not overwritten")
