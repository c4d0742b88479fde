"""``flrc-edge export``: checkpoint in, bundle out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import INTEGERS
from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_exporters.node_placement import Placement
    from flrc_exporters.number_format import AccuracyLevel
    from flrc_runtime.manifest import Manifest

DTYPES = click.Choice(["fp32", *INTEGERS])
LEVELS: dict[str, AccuracyLevel] = {"0": 0, "4": 4}


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle folder to write."
)
@click.option(
    "--dtype",
    type=DTYPES,
    help="Number format of a checkpoint of floats, rounded to nearest; default: int4, or int8 if it holds pivoted "
    "factors. int4/128 has one scale in 128 inputs instead of 32.",
)
@click.option("--head", type=DTYPES, help="Number format of embedding and head; default: that of --dtype.")
@click.option(
    "--context", type=int, help="Tokens a conversation may have; default: the model's, at most 4096."
)
@click.option(
    "--cache",
    type=click.Choice(["float32", "float16", "int8"]),
    help="Numbers of keys and values, with --graph own.  [default: float16; float32 with --dtype fp32]",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    default="4",
    show_default=True,
    help="Of a stock, static or optimum graph. 4: kernels of integer weights may round activations to int8, which is "
    "faster; 0: they do not.",
)
@click.option(
    "--graph",
    type=click.Choice(["own", "stock", "static", "optimum"]),
    default="own",
    show_default=True,
    help="own: the project's operators. stock: onnxruntime's, for onnxruntime-genai, WebGPU and onnxruntime-web. "
    "static: standard operators and fixed shapes, for accelerators, two graphs a stage, fp32 by default. optimum: the "
    "graph that optimum-onnx exports, factorized, for ORTModelForCausalLM; takes families that ours lacks.",
)
@click.option(
    "--prefill",
    type=int,
    metavar="TOKENS",
    help="With --graph static: tokens of a prompt that one run takes.  [default: 32]",
)
@click.option(
    "--target",
    type=click.Choice(["qnn"]),
    help="qnn: static graphs compiled ahead of time for a Qualcomm NPU, in float16 (needs flrc-edge[qnn] on Linux or "
    "Windows, x86-64).",
)
@click.option("--soc", metavar="NAME", help="With --target qnn: the SoC, such as SM8650.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "a16w8"]),
    default="fp16",
    show_default=True,
    help="With --target qnn: float16, or int8 weights and 16-bit activations, calibrated on built-in texts.",
)
@click.option(
    "--share/--no-share",
    default=True,
    show_default=True,
    help="With --target qnn: one copy of the weights for all stages, for a phone; its simulator on x86-64 cannot run "
    "that.",
)
@click.option(
    "--optimum-python",
    metavar="PYTHON",
    help="With --graph optimum: of the environment with optimum-onnx ($FLRC_EDGE_OPTIMUM).",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    checkpoint: Path,
    output: Path,
    dtype: Any,
    head: Any,
    context: int | None,
    cache: Any,
    accuracy_level: str,
    graph: str,
    prefill: int | None,
    target: str | None,
    soc: str | None,
    precision: str,
    share: bool,
    optimum_python: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT into a bundle: one ONNX graph per stage, one weight file.

    A checkpoint of integers (compress --dtype) is laid out as it is. Of one of floats, integers are rounded to
    nearest, without compensating the error.
    """
    from flrc_exporters.bundle import export
    from flrc_exporters.number_format import default_dtype
    from flrc_runtime.manifest import read

    if target is not None and graph == "own":
        graph = "static"
    if graph != "static" and prefill is not None:
        raise UsageError("--prefill is for --graph static", hint="leave it out, or add --graph static")
    if (target is None) != (soc is None):
        raise UsageError("--target qnn and --soc go together", hint="for example --target qnn --soc SM8650")
    if target is not None and graph != "static":
        raise UsageError("--target qnn compiles static graphs", hint="leave out --graph")
    if cache is not None and graph != "own":
        raise UsageError("--cache is for --graph own", hint="leave it out: others keep float32")
    if graph == "optimum":
        if head is not None or context is not None:
            raise UsageError("--head and --context are for our own graph", hint="leave them out")
        _portable(
            checkpoint,
            output,
            dtype or "fp32",
            optimum_python,
            accuracy_level=LEVELS[accuracy_level],
            overwrite=overwrite,
            as_json=as_json,
        )
        return
    quiet = bool((ctx.find_root().params or {}).get("quiet"))
    if dtype != "fp32" and graph in ("own", "stock") and not quiet:
        plan = read(checkpoint, "checkpoint").plan
        if not plan.embedding:
            click.echo(f"{dtype or default_dtype(plan)}: weights are rounded to nearest", err=True)
    if graph == "static" and prefill is None:
        prefill = 32
    options = {
        "dtype": dtype,
        "head": head,
        "context": context,
        "accuracy_level": LEVELS[accuracy_level],
        "stock": graph == "stock",
        "prefill": prefill,
        "cache": cache,
    }
    placed: dict[str, Placement] = {}
    with from_context() as progress:
        if soc is None:
            manifest = export(checkpoint, output, overwrite=overwrite, progress=progress, **options)
        else:
            manifest, placed = _for_npu(
                checkpoint,
                output,
                options,
                soc=soc,
                precision=precision,
                share=share,
                overwrite=overwrite,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(_summary(manifest, output), indent=1))
        return
    for name, where in placed.items():
        others = sorted({operator for _, operator in where.elsewhere})
        rest = f", elsewhere: {', '.join(others)}" if others else ""
        click.echo(f"{name}: {where.placed} of {where.nodes} nodes on the NPU{rest}", err=True)
    click.echo(
        f"Wrote {output} ({_mb(_size(manifest))}, {manifest.dtype}, context {manifest.model.context_length}):"
    )
    for i, stage in enumerate(manifest.stages):
        click.echo(f"  stage {i}  keep {stage.keep:.3f}  reads {_mb(stage.bytes)} a token")
    option = f" --provider {_provider_text(soc)}" if soc else ""
    click.echo(f'Next: flrc-edge generate {output} "Once upon a time"{option}')


def _for_npu(
    checkpoint: Path,
    output: Path,
    options: dict[str, Any],
    *,
    soc: str,
    precision: str,
    share: bool,
    overwrite: bool,
    progress: Callable[[str, int, int], None],
) -> tuple[Manifest, dict[str, Placement]]:
    """Export static graphs into a temporary folder and compile them."""
    from flrc_exporters.bundle import export
    from flrc_exporters.qnn import compile_static, qnn_provider, quantize_static
    from flrc_runtime.output_folder import check_output_folder

    check_output_folder(output, overwrite=overwrite)
    qnn_provider(soc)  # refuses early what the compiler would
    with tempfile.TemporaryDirectory(prefix="flrc-edge-") as scratch:
        static, quantized = Path(scratch) / "static", None
        export(checkpoint, static, progress=progress, **options)
        if precision == "a16w8":
            from flrc_edge.accelerators import calibration_windows
            from flrc_runtime import load

            windows = calibration_windows(load(static))
            quantized = quantize_static(static, windows, Path(scratch), progress=progress)
        return compile_static(
            static, output, soc=soc, share=share, quantized=quantized, overwrite=overwrite, progress=progress
        )


def _provider_text(soc: str) -> str:
    from flrc_exporters.qnn import SOCS

    return "qnn:soc_model={},htp_arch={}".format(*SOCS[soc.upper()])


def _portable(
    checkpoint: Path,
    output: Path,
    dtype: Any,
    python: str | None,
    *,
    accuracy_level: AccuracyLevel,
    overwrite: bool,
    as_json: bool,
) -> None:
    from flrc_exporters.portable import export_portable

    with from_context() as progress:
        manifest = export_portable(
            checkpoint,
            output,
            optimum=python,
            dtype=dtype,
            accuracy_level=accuracy_level,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(_summary(manifest, output), indent=1))
        return
    click.echo(f"Wrote {output} ({_mb(_size(manifest))}, {manifest.dtype}, from optimum's graph):")
    for stage in manifest.stages:
        click.echo(f"  {stage.graph}  keep {stage.keep:.3f}  reads {_mb(stage.bytes)} a token")
    click.echo(
        f'Next: ORTModelForCausalLM.from_pretrained("{output}", file_name="{manifest.stages[0].graph}")'
    )


def _summary(manifest: Manifest, output: Path) -> dict[str, Any]:
    return {
        "bundle": str(output),
        "dtype": manifest.dtype,
        "context": manifest.model.context_length,
        "bytes": _size(manifest),
        "stages": [{"graph": s.graph, "keep": s.keep, "bytes": s.bytes} for s in manifest.stages],
    }


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
