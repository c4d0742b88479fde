"""``flrc-edge eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context


@click.command()
@click.argument("target")
@click.option(
    "--dense", metavar="MODEL", help="The dense model: a model, or a checkpoint or bundle of keep 1."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="NAME",
    help="File, folder or built-in text (repeatable); by default wikitext2-heldout and austen-heldout.",
)
@click.option("--no-text", is_flag=True, help="Measure summaries only.")
@click.option("--windows", default=16, show_default=True, help="Of each text, from its beginning; 0 for all.")
@click.option("--window", default=1024, show_default=True, help="Tokens of a window.")
@click.option("--stride", type=int, help="Tokens from one window's start to the next; no overlap by default.")
@click.option(
    "--summarize",
    "summaries",
    multiple=True,
    metavar="FILE",
    help="DialogSum or CNN/DM, .jsonl or .csv (repeatable).",
)
@click.option("--samples", default=50, show_default=True, help="Texts of each file to summarize.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens of a summary, at most.")
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "all"]),
    default="test",
    show_default=True,
    help="Part of each file, by the hash of the id.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="POLICY",
    help="static:S, static:S:prompt0, schedule, reversed or dense (repeatable); by default all that are worth "
    "comparing.",
)
@click.option("--bertscore", metavar="FOLDER", help="Also BERTScore, with the encoder in this folder.")
@click.option("--resamples", default=1000, show_default=True, help="Of the bootstrap intervals.")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap intervals.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Put the result into this JSON file and its .md page."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    target: str,
    dense: str | None,
    texts: tuple[str, ...],
    no_text: bool,
    windows: int,
    summaries: tuple[str, ...],
    save: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how good TARGET is: a checkpoint, a bundle, or a model.

    Texts give perplexity, bits per byte and, with --dense, the divergence from the dense model. --summarize gives
    ROUGE, repetition and divergence of answers under every policy of stages. Every figure has a 95 % interval.
    """
    from flrc_edge.evaluation.evaluate import TEXTS, Settings, evaluate
    from flrc_edge.evaluation.subject import open_subject

    chosen = Settings(
        texts=() if no_text else texts or TEXTS,
        windows=None if windows == 0 else windows,
        summaries=summaries,
        **settings,
    )
    with from_context() as progress:
        subject = open_subject(target)
        reference = None if dense is None else open_subject(dense)
        result = evaluate(subject, chosen, dense=reference, progress=progress)

    from flrc_edge import report
    from flrc_edge.evaluation.tables import evaluation_table

    value = result.as_dict()
    click.echo(json.dumps(value, indent=1) if as_json else evaluation_table(value))
    if save is not None:
        report.save(save, "evaluation", f"{result.model}, {Path(target).name}", value)
