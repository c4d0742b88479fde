"""``flrc-edge compare``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import calibration_options, parse_keeps


@click.command()
@click.argument("model")
@click.option("--keep", default=".9,.8,.6", show_default=True, metavar="K,K,…", help="Each measured alone.")
@click.option(
    "--allocator",
    "allocators",
    type=click.Choice(["uniform", "fisher", "spectrum"]),
    multiple=True,
    help="Which to compare (repeatable); all by default.",
)
@click.option(
    "--text", default="wikitext2-heldout", show_default=True, help="What perplexity is measured on."
)
@click.option(
    "--windows", default=20, show_default=True, help="Evaluation windows from the text's beginning."
)
@click.option("--formats", is_flag=True, help="Compare number formats of the dense model instead.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Put the result into this JSON file and its .md page."
)
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    keep: str,
    allocators: tuple[Any, ...],
    text: str,
    windows: int,
    formats: bool,
    save: Path | None,
    texts: tuple[str, ...],
    no_cache: bool,
    as_json: bool,
    factorization: Any,
    **settings: Any,
) -> None:
    """Compare allocators (or, with --formats, number formats) on MODEL by perplexity.

    Every allocator gets the same parameters, calibration and factors. The named --factorization is measured, and
    the one-sided one (SVD-LLM) beside it.
    """
    from flrc_edge.allocation import check_keep
    from flrc_edge.models import open_model, resolve_model

    keeps = parse_keeps(keep)
    for k in keeps:
        check_keep((k,))
    resolve_model(model)

    from flrc_edge import report
    from flrc_edge.compare import compare
    from flrc_edge.compression import DEFAULT_TEXTS, Settings
    from flrc_edge.formats import compare_formats
    from flrc_edge.texts import WeightedText

    with from_context() as progress:
        loaded = open_model(model)
        result: Any
        if formats:
            section, render = "formats", report.formats_table
            result = compare_formats(loaded, text=text, progress=progress)
        else:
            section, render = "allocators", report.allocators_table
            sources = tuple(WeightedText.parse(t) for t in texts) or DEFAULT_TEXTS
            chosen = Settings(texts=sources, reuse_statistics=not no_cache, **settings)
            result = compare(
                loaded,
                chosen,
                keeps=keeps,
                text=text,
                windows=windows,
                allocators=allocators or ("uniform", "fisher", "spectrum"),
                methods=tuple(dict.fromkeys((factorization, "one-sided"))),
                progress=progress,
            )
    value = asdict(result)
    click.echo(json.dumps(value, indent=1) if as_json else render(value))
    if save is not None:
        report.save(save, section, loaded.name, value)
