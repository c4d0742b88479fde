"""``flrc-edge heal``."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import parse_keeps

if TYPE_CHECKING:
    from flrc_edge.healing import Point

log = logging.getLogger(__name__)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write."
)
@click.option(
    "--model",
    help="The dense model it was compressed from (folder, GGUF file, hub id or built-in name); "
    "by default the built-in one that the checkpoint names.",
)
@click.option("--steps", type=int, help="Optimizer steps, 400 if no --minutes are given.")
@click.option(
    "--minutes", type=float, help="Wall time of training instead; two such runs are not quite the same."
)
@click.option("--tokens-per-step", default=1024, show_default=True, help="Tokens of a step.")
@click.option("--window", default=512, show_default=True, help="Tokens of a window.")
@click.option("--lr", type=float, help="Learning rate, relative to the size of each tensor.  [default: 2e-4]")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: any.")
@click.option(
    "--train",
    type=click.Choice(["factors", "projections", "all"]),
    help="Only the factors; also the projections that stayed dense; also norms and biases.",
)
@click.option(
    "--stage-weights", metavar="W,W,…", help="How often each stage is trained; all the same by default."
)
@click.option(
    "--calibration",
    "texts",
    metavar="TEXT[:WEIGHT]",
    multiple=True,
    help="File, folder or built-in text (chat, wikitext2, austen) to heal on; repeatable. "
    "By default half chat and a quarter each of the others.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses the order of the windows.")
@click.option(
    "--validate-every", default=50, show_default=True, help="Steps between measurements on held-out windows."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the matrix products; auto: bfloat16 where the processor is built for it.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run into the same output.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Put the curve into this JSON file and its .md page."
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path,
    output: Path,
    model: str | None,
    lr: float | None,
    train: Any,
    stage_weights: str | None,
    texts: tuple[str, ...],
    resume: bool,
    save: Path | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train CHECKPOINT's factors for a while to answer as the dense model does.

    KL(dense || stage) is minimised over the whole vocabulary, the stages in turn. Ctrl-C keeps what was done.

    \b
    flrc-edge heal ckpt -o healed --minutes 60
    flrc-edge heal ckpt -o healed --minutes 60 --resume

    \b
    On several processes (on the CPU, too, but only --multi_gpu starts more than one):
    accelerate launch --multi_gpu --num_processes 2 -m flrc_edge heal ckpt -o healed
    """  # noqa: D301 (click reads the backspace character)
    from flrc_edge.texts import WeightedText
    from flrc_runtime import manifest
    from flrc_runtime.output_folder import check_output_folder

    check_output_folder(output, overwrite=overwrite)
    manifest.read(checkpoint, "checkpoint")
    given = {
        "lr": lr,
        "train": train,
        "stage_weights": stage_weights and parse_keeps(stage_weights),
        "texts": tuple(WeightedText.parse(t) for t in texts) or None,
    }
    settings |= {name: value for name, value in given.items() if value is not None}

    from flrc_edge.healing import Interrupted, Settings, heal

    try:
        with from_context() as progress:
            result = heal(
                checkpoint,
                output,
                Settings(**settings),
                model=model,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
                on_point=_log_point,
            )
    except Interrupted as error:
        arguments = [a for a in sys.argv[1:] if a != "--resume"]
        click.echo(
            f"{error.step} steps are saved; go on with: flrc-edge {shlex.join(arguments)} --resume", err=True
        )
        if error.signal == signal.SIGTERM:
            sys.exit(128 + error.signal)
        raise
    if result is None:
        return
    if save is not None:
        from flrc_edge.report import save as save_result

        save_result(save, "healing", output.name, result.benchmark(checkpoint.name))
    if as_json:
        report = {
            "checkpoint": str(output),
            "tokens": result.tokens,
            "curve": [asdict(p) for p in result.curve],
        }
        click.echo(json.dumps(report, indent=1))
        return
    for line in _curve(result.curve):
        click.echo(line)
    last = result.curve[-1]
    click.echo(f"{output}: {last.step} steps, {result.tokens} tokens, {last.minutes:.1f} minutes")
    click.echo(f"Next: flrc-edge export {output} -o {output}.onnx")


def _log_point(point: Point) -> None:
    log.info(
        "step %d, %.1f min: KL on held-out windows %s", point.step, point.minutes, _row(point.validation)
    )


def _row(values: tuple[float | None, ...]) -> str:
    return "  ".join("     -" if v is None else f"{v:.4f}" for v in values)


def _curve(points: tuple[Point, ...]) -> Iterator[str]:
    """Yield the lines of a table: KL (nats a token) of every stage, while training and on held-out windows."""
    stages = range(len(points[0].validation))
    names = "  ".join(f"stage {s}"[-6:].rjust(6) for s in stages)
    yield f"{'step':>6} {'minutes':>8}   training: {names}   held out: {names}"
    for p in points:
        yield f"{p.step:>6} {p.minutes:>8.1f}   {'':9} {_row(p.train)}   {'':9} {_row(p.validation)}"
