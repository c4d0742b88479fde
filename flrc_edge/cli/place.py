"""``flrc-edge place``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.errors import UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--provider", default="qnn", show_default=True, help="webgpu, qnn or a name of onnxruntime's.")
@click.option("--soc", metavar="NAME", help="With qnn: the SoC, such as SM8650.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "a16w8"]),
    default="fp16",
    show_default=True,
    help="With qnn: float16, or int8 weights and 16-bit activations.",
)
@click.option(
    "--tokens", type=int, default=16, show_default=True, help="Given tokens to run, all stages in turn."
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=None,
    help="Put the result into this JSON file and its .md page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundle: Path,
    provider: str,
    soc: str | None,
    precision: Any,
    tokens: int,
    save: Path | None,
    as_json: bool,
) -> None:
    """Say where an accelerator runs the nodes of BUNDLE, and how far its logits are from the CPU's.

    For a Qualcomm NPU the graphs are compiled into a temporary folder and run on its simulator (x86-64), which says
    nothing about the speed of a phone.

    \b
    flrc-edge export CHECKPOINT -o static --graph static --context 256
    flrc-edge place static --provider qnn --soc SM8650
    flrc-edge place bundle --provider webgpu
    """  # noqa: D301 (click reads the backspace character)
    if tokens < 2:
        raise UsageError(f"--tokens must be at least 2, not {tokens}")
    from flrc_edge.accelerators import measure

    with from_context() as progress:
        found = measure(bundle, provider, soc=soc, tokens=tokens, precision=precision, progress=progress)
    if save is not None:
        from flrc_edge import report

        name = " ".join([provider.partition(":")[0], *([precision] if soc else [])])
        report.save(save, "accelerators", f"{found.model} {found.dtype} {name}", found.as_dict())
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
        return
    for graph in found.graphs:
        rest = f", elsewhere: {', '.join(sorted(set(graph.elsewhere)))}" if graph.elsewhere else ""
        size = f", {graph.binary_bytes / 1e6:.1f} MB alone" if graph.binary_bytes else ""
        click.echo(f"{graph.name}: {graph.placed} of {graph.nodes} nodes on {found.provider}{rest}{size}")
    if found.shared_bytes:
        click.echo(f"all binaries with one copy of the weights: {found.shared_bytes / 1e6:.1f} MB")
    click.echo(
        f"{found.tokens} tokens through {len(set(found.stages))} stages: relative L2 {found.relative_l2:.2g} from the "
        f"CPU, same best token {found.top1:.0%}, {found.ms_per_token:.0f} ms a token here"
    )
