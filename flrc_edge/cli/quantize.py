"""``flrc-edge quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import INTEGERS


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write."
)
@click.option(
    "--dtype",
    type=click.Choice(INTEGERS),
    default="int4",
    show_default=True,
    help="Number format of the projections; int4/128 has one scale in 128 inputs instead of 32.",
)
@click.option(
    "--head",
    type=click.Choice(INTEGERS),
    default="int8",
    show_default=True,
    help="Numbers of embedding and head.",
)
@click.option(
    "--calibration",
    "texts",
    metavar="TEXT[:WEIGHT]",
    multiple=True,
    help="File, folder or built-in text (chat, wikitext2, austen) to measure inputs on; repeatable. "
    "By default half chat and a quarter each of the others.",
)
@click.option("--windows", default=24, show_default=True, help="Windows of them.")
@click.option("--window", default=1024, show_default=True, help="Tokens of each.")
@click.option("--seed", default=0, show_default=True, help="Chooses the windows.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path, output: Path, texts: tuple[str, ...], overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Round CHECKPOINT, one of floats, to integers that make up for their rounding errors.

    What `compress --dtype` does at once, for a checkpoint that was healed in between.

    \b
    flrc-edge compress smollm2-135m -o ckpt --keep .8
    flrc-edge heal ckpt -o healed --minutes 60
    flrc-edge quantize healed -o healed-int4
    """  # noqa: D301 (click reads the backspace character)
    from flrc_edge.texts import WeightedText
    from flrc_runtime.output_folder import check_output_folder

    check_output_folder(output, overwrite=overwrite)
    sources = tuple(WeightedText.parse(t) for t in texts)

    from flrc_edge.checkpoint_quantization import quantize
    from flrc_edge.settings import DEFAULT_TEXTS

    with from_context() as progress:
        written = quantize(
            checkpoint,
            output,
            texts=sources or DEFAULT_TEXTS,
            overwrite=overwrite,
            progress=progress,
            **settings,
        )
    size = sum(f.size for f in written.files.values())
    if as_json:
        click.echo(json.dumps({"checkpoint": str(output), "dtype": written.dtype, "bytes": size}, indent=1))
        return
    click.echo(f"{output}: {written.dtype}, {size / 1e6:.1f} MB")
    click.echo(f"Next: flrc-edge export {output} -o {output}.onnx")
