"""``flrc-edge compare``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import calibration_options, parse_keeps
from flrc_edge.errors import UsageError
from flrc_edge.recipes import RECIPES

HELD_OUT = ("wikitext2-heldout", "austen-heldout")


@click.command()
@click.argument("model")
@click.option("--keep", default=".9,.8,.6", show_default=True, metavar="K,K,…", help="Each measured alone.")
@click.option(
    "--recipe",
    "names",
    type=click.Choice([recipe.name for recipe in RECIPES]),
    multiple=True,
    help="Which to compare (repeatable); all by default. ASVD's rank search takes far longer than all others.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A checkpoint of MODEL, such as a healed one, to measure beside them (repeatable).",
)
@click.option(
    "--storage",
    type=click.Choice(["plain", "pivoted", "both"]),
    default="plain",
    show_default=True,
    help="How the recipes' factors are stored.",
)
@click.option(
    "--text",
    "measured",
    multiple=True,
    default=HELD_OUT,
    show_default=True,
    help="What perplexity is measured on (repeatable).",
)
@click.option("--windows", default=20, show_default=True, help="Windows from the beginning of each text.")
@click.option("--asvd-samples", default=4, show_default=True, help="Calibration windows of ASVD's search.")
@click.option("--asvd-window", default=512, show_default=True, help="Tokens of each.")
@click.option("--formats", is_flag=True, help="Compare number formats of the dense model instead.")
@click.option(
    "--frontier",
    "as_frontier",
    is_flag=True,
    help="Measure quality against bytes instead: the dense model, baselines and ours in integers.",
)
@click.option(
    "--joint",
    is_flag=True,
    help="Predict instead what one V for q, k and v, and one for gate and up, would gain.",
)
@click.option(
    "--bits",
    default="6,5,4.5,4,3.5,3",
    show_default=True,
    metavar="B,B,…",
    help="With --frontier, mean bits a parameter of the whole file that mixed formats are chosen for.",
)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Put the result into this JSON file and its .md page."
)
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    keep: str,
    names: tuple[str, ...],
    checkpoints: tuple[Path, ...],
    storage: Any,
    measured: tuple[str, ...],
    windows: int,
    asvd_samples: int,
    asvd_window: int,
    formats: bool,
    as_frontier: bool,
    joint: bool,
    bits: str,
    save: Path | None,
    texts: tuple[str, ...],
    no_cache: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare recipes (or number formats, sizes, joint factors) on MODEL by perplexity.

    A recipe is a way to fit factors and to choose ranks: published baselines, Fisher scores (FLRA), and spectra.
    All get the same stored parameters and calibration.

    \b
    flrc-edge compare smollm2-135m --keep .8 --recipe svd-llm --recipe flra-gw2 --recipe spectrum-two-sided
    """  # noqa: D301 (click reads the backspace character)
    from flrc_edge.allocation import check_keep
    from flrc_edge.models import open_model, resolve_model

    keeps, wanted_bits = parse_keeps(keep), parse_keeps(bits)
    for k in keeps:
        check_keep((k,))
    if formats + as_frontier + joint > 1:
        raise UsageError("--formats, --frontier and --joint are different comparisons; ask for one of them")
    if not all(0 < b <= 32 for b in wanted_bits):
        raise UsageError(f"--bits must lie between 0 and 32, not {bits}")
    if as_frontier and storage == "both":
        raise UsageError("--frontier takes one storage; pivoted lets each projection have either")
    if formats and len(measured) > 1 and measured != HELD_OUT:
        raise UsageError("--formats takes one --text")
    resolve_model(model)

    from flrc_edge import report
    from flrc_edge.baselines.rank_search import Search
    from flrc_edge.compare import compare
    from flrc_edge.formats import compare_formats
    from flrc_edge.frontier import frontier
    from flrc_edge.joint_factors import compare_joint
    from flrc_edge.settings import DEFAULT_TEXTS, Settings
    from flrc_edge.texts import WeightedText

    sources = tuple(WeightedText.parse(t) for t in texts) or DEFAULT_TEXTS
    conditions = Settings(texts=sources, reuse_statistics=not no_cache, **settings)
    search = Search(samples=asvd_samples, window=asvd_window)
    with from_context() as progress:
        loaded = open_model(model)
        result: Any
        if formats:
            section, render = "formats", report.formats_table
            result = compare_formats(loaded, text=measured[0], progress=progress)
        elif as_frontier:
            section, render = "frontier", report.frontier_table
            result = frontier(
                loaded,
                replace(conditions, storage=storage),
                bits=wanted_bits,
                keeps=keeps,
                texts=measured,
                windows=windows,
                progress=progress,
            )
        elif joint:
            section, render = "joint", report.joint_table
            result = compare_joint(loaded, conditions, keeps=keeps, progress=progress)
        else:
            section, render = "recipes", report.recipes_table
            wanted = [r for r in RECIPES if not names or r.name in names]
            plain = wanted if storage != "pivoted" else []
            pivoted = [r.stored("pivoted") for r in wanted if storage != "plain"]
            result = compare(
                loaded,
                conditions,
                keeps=keeps,
                texts=measured,
                windows=windows,
                recipes=[*plain, *pivoted],
                checkpoints=checkpoints,
                search=search,
                progress=progress,
            )
    value = asdict(result)
    click.echo(json.dumps(value, indent=1) if as_json else render(value))
    if save is not None:
        report.save(save, section, loaded.name, value)
