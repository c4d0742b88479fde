"""``flrc-edge compress``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import (
    INTEGERS,
    calibration_options,
    factor_options,
    parse_integers,
    parse_keeps,
    parse_size,
)
from flrc_edge.cli.stage_text import schedule_text
from flrc_edge.errors import UsageError


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write."
)
@click.option("--keep", help="Share of the projections' parameters to keep, in (0, 1]: one stage.")
@click.option("--stages", metavar="K,K,…", help="Keep of each stage, falling; the first is what is stored.")
@click.option(
    "--target-size",
    metavar="SIZE,…",
    help="Instead of keeps, bytes of the exported weights, such as 90MB, at each stage; the first is the file's size.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float", *INTEGERS, "mixed"]),
    help="Numbers of the projections; integers are rounded with compensation, better than export --dtype does; "
    "int4/128 has one scale in 128 inputs instead of 32, which is smaller, faster and a little worse. "
    "mixed: the format of every matrix is chosen with its rank, for --target-size.  [default: mixed with "
    "--target-size, else float]",
)
@click.option(
    "--head",
    type=click.Choice(INTEGERS),
    default="int8",
    show_default=True,
    help="Numbers of embedding and head with a --dtype of integers.",
)
@click.option(
    "--allocator",
    type=click.Choice(["measured", "search", "spectrum", "fisher", "uniform"]),
    default="measured",
    show_default=True,
    help="How ranks are shared out.",
)
@click.option(
    "--score",
    type=click.Choice(["gw2", "gw2-rms", "g2-sum", "g2-mean", "g2-rms"]),
    default="gw2",
    show_default=True,
    help="Fisher score of the allocator fisher.",
)
@click.option(
    "--boundaries", metavar="N,N,…", help="Token counts at which decoding moves on; measured by default."
)
@calibration_options
@factor_options
@click.option(
    "--graph",
    type=click.Choice(["own", "optimum"]),
    default="own",
    show_default=True,
    help="optimum: also take families that only optimum-onnx exports (float factors; see export --graph).",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    output: Path,
    keep: str | None,
    stages: str | None,
    target_size: str | None,
    dtype: Any,
    boundaries: str | None,
    texts: tuple[str, ...],
    no_cache: bool,
    graph: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compress MODEL (a folder, GGUF file, hub id or built-in name) into a checkpoint.

    \b
    flrc-edge compress smollm2-135m -o ckpt --stages .9,.8,.7
    flrc-edge compress smollm2-135m -o ckpt --target-size 80MB
    flrc-edge compress ./my-model -o ckpt --keep .8 --calibration notes.txt:2 --calibration wikitext2

    \b
    On several processes (they calibrate on the CPU, but only --multi_gpu starts more than one):
    accelerate launch --multi_gpu --num_processes 2 -m flrc_edge compress smollm2-135m -o ckpt
    """  # noqa: D301 (click reads the backspace character)
    keeps = _keeps(keep, stages, target_size)
    sizes = () if target_size is None else tuple(parse_size(part) for part in target_size.split(","))
    edges = None if boundaries is None else parse_integers(boundaries)

    # Everything that can be refused without torch has been; now the heavy imports.
    from flrc_edge.models import resolve_model
    from flrc_edge.texts import WeightedText
    from flrc_runtime.output_folder import check_output_folder

    check_output_folder(output, overwrite=overwrite)
    sources = tuple(WeightedText.parse(t) for t in texts)
    resolve_model(model, portable=graph == "optimum")

    from flrc_edge.compression import compress
    from flrc_edge.progress import Timings, peak_rss_bytes
    from flrc_edge.settings import DEFAULT_TEXTS, Settings

    chosen = Settings(
        keep=keeps or Settings().keep,
        sizes=sizes,
        dtype=dtype or ("mixed" if sizes else "float"),
        boundaries=edges,
        texts=sources or DEFAULT_TEXTS,
        reuse_statistics=not no_cache,
        **settings,
    )
    timings = Timings()
    try:
        with from_context() as progress:
            result = compress(
                model,
                output,
                chosen,
                portable=graph == "optimum",
                overwrite=overwrite,
                progress=progress,
                timings=timings,
            )
    except (KeyboardInterrupt, SystemExit):
        if not no_cache:
            click.echo(
                f"What was measured is kept; go on with: flrc-edge {shlex.join(sys.argv[1:])}", err=True
            )
        raise
    if result is None:
        return
    plan = result.plan
    size = sum(f.size for f in result.files.values())
    if as_json:
        report = {
            "checkpoint": str(output),
            "bytes": size,
            "stages": [{"keep": plan.kept(s)} for s in range(plan.num_stages)],
            "boundaries": result.schedule.boundaries,
            "seconds": timings.seconds,
            "peak_bytes": peak_rss_bytes(),
        }
        click.echo(json.dumps(report, indent=1))
        return
    kept = ", ".join(f"{plan.kept(s):.3f}" for s in range(plan.num_stages))
    dense = sum(p.dense for p in plan.projections)
    click.echo(
        f"{output}: {size / 1e6:.0f} MB; kept {kept}; {dense} of {len(plan.projections)} projections dense"
    )
    if plan.num_stages > 1:
        context = result.model.context_length
        click.echo(schedule_text(result.schedule, stages=plan.num_stages, context=context))
    click.echo("  ".join(f"{name} {seconds:.1f} s" for name, seconds in timings.seconds.items()))
    way = " --graph optimum" if graph == "optimum" else ""
    click.echo(f"Next: flrc-edge export {output} -o {output}.onnx{way}")


def _keeps(keep: str | None, stages: str | None, target_size: str | None) -> tuple[float, ...] | None:
    """Return the keeps the options name, or None for the default or for what --target-size gives."""
    given = [
        name
        for name, value in (("--keep", keep), ("--stages", stages), ("--target-size", target_size))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} say the same thing twice; give one of them")
    text = stages if keep is None else keep
    if text is None:
        return None
    keeps = parse_keeps(text)
    if keep is not None and len(keeps) > 1:
        raise UsageError("--keep takes one number; --stages takes several")
    return keeps
