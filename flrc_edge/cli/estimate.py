"""``flrc-edge estimate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.settings import INTEGERS, parse_integers, parse_keeps, parse_size
from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_edge.compress_cost import CompressCost
    from flrc_edge.estimation import Estimate


@click.command()
@click.argument("model")
@click.option("--keep", help="Share of the projections' parameters to keep, in (0, 1]: one stage.")
@click.option("--stages", metavar="K,K,…", help="Keep of each stage, falling.  [default: 0.95,0.9,0.85]")
@click.option(
    "--target-size", metavar="SIZE", help="Instead, the largest keep whose weights fit, such as 90MB."
)
@click.option(
    "--target-ram",
    metavar="SIZE",
    help="Instead, the largest keep that decodes in this much memory with a full context.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", *INTEGERS]),
    default="int4",
    show_default=True,
    help="Numbers of the bundle's projections.",
)
@click.option(
    "--head",
    type=click.Choice(INTEGERS),
    default="int8",
    show_default=True,
    help="Numbers of embedding and head with a --dtype of integers.",
)
@click.option(
    "--storage",
    type=click.Choice(["pivoted", "plain"]),
    help="How factors are stored.  [default: plain for 4 bits, else pivoted]",
)
@click.option(
    "--context", type=int, default=None, metavar="TOKENS", help="Prompt and answer together.  [default: 2048]"
)
@click.option("--tokens", type=int, default=32768, show_default=True, help="Calibration tokens.")
@click.option(
    "--check",
    metavar="N,N,…",
    help="Compress MODEL on so many tokens, once each at keep .8 (minutes to hours), and show what it took beside the "
    "estimate.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=None,
    help="With --check, put the result into this JSON file and its .md page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    keep: str | None,
    stages: str | None,
    target_size: str | None,
    target_ram: str | None,
    dtype: str,
    head: Any,
    storage: Any,
    context: int | None,
    tokens: int,
    check: str | None,
    save: Path | None,
    as_json: bool,
) -> None:
    """Say what a compressed MODEL will take, from its config.json alone.

    MODEL is a folder with a config.json or that file itself, a GGUF file, a hub id or a built-in name. Ranks are shared
    out evenly here; those that compress measures fill the same budgets.

    \b
    flrc-edge estimate smollm2-135m --stages .9,.8,.7
    flrc-edge estimate ./my-model/config.json --dtype int8 --target-ram 2GB
    """  # noqa: D301 (click reads the backspace character)
    names = ("--keep", "--stages", "--target-size", "--target-ram")
    given = [n for n, v in zip(names, (keep, stages, target_size, target_ram), strict=True) if v is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} say the same thing twice; give one of them")
    if tokens < 2:
        raise UsageError(f"--tokens must be at least 2, not {tokens}")
    if save is not None and check is None:
        raise UsageError("--save keeps what --check measures")
    if check is not None:
        _check(model, parse_integers(check), save, as_json=as_json)
        return
    limit = parse_size(target_size or target_ram or "1")
    keeps = parse_keeps(keep or stages or ".95,.9,.85")
    if keep is not None and len(keeps) > 1:
        raise UsageError("--keep takes one number; --stages takes several")

    from flrc_edge.compress_cost import compress_cost
    from flrc_edge.compress_trial import Trial
    from flrc_edge.estimation import estimate, largest_keep
    from flrc_edge.models import read_decoder_config
    from flrc_edge.settings import default_storage
    from flrc_runtime.bundle import DEFAULT_CONTEXT

    storage = storage or default_storage(dtype)
    name, config = read_decoder_config(model)
    positions = min(config.context_length, DEFAULT_CONTEXT) if context is None else context
    if not 2 <= positions <= config.context_length:
        raise UsageError(
            f"context {positions} must lie between 2 and the model's {config.context_length} tokens"
        )

    def estimated(*keep: float) -> Estimate:
        return estimate(config, keep, dtype=dtype, head=head, storage=storage, context=positions)

    if target_size is not None:
        keeps = (largest_keep(lambda k: estimated(k).file_bytes <= limit, target_size),)
    elif target_ram is not None:
        keeps = (largest_keep(lambda k: estimated(k).memory_bytes <= limit, target_ram),)
    result = estimated(*keeps)
    window = min(1024, config.context_length)
    cost = compress_cost(
        config,
        tokens=tokens,
        window=window,
        storage=storage,
        integers=dtype != "fp32",
        trial=Trial.of(config, window=window, storage=storage),
    )
    if as_json:
        fields = {k: v for k, v in asdict(result).items() if k != "plan"}
        click.echo(json.dumps({"model": name, **fields, "compress": asdict(cost)}, indent=1))
        return
    for line in _lines(name, result, cost, tokens):
        click.echo(line)


def _check(model: str, tokens: tuple[int, ...], save: Path | None, *, as_json: bool) -> None:
    """Measure, and keep the result beside those of other models."""
    from flrc_edge.cli.progress_bar import from_context
    from flrc_edge.measured_cost import measure_cost, with_earlier
    from flrc_edge.report import cost_table
    from flrc_edge.report import save as save_result

    if min(tokens) < 1024:
        raise UsageError(f"--check needs at least one window of 1024 tokens, not {min(tokens)}")
    with from_context() as progress:
        result = asdict(measure_cost([model], tokens, progress=progress))
    click.echo(json.dumps(result, indent=1) if as_json else cost_table(result))
    if save is not None:
        save_result(save, "cost", "compress", with_earlier(save, "compress", result))


def _lines(name: str, e: Estimate, cost: CompressCost, tokens: int) -> list[str]:
    head = "" if e.dtype == "fp32" else f", embedding and head {e.head}"
    lines = [
        f"{name}: {e.parameters / 1e6:,.1f} M parameters, {e.projection_parameters / 1e6:,.1f} M in projections",
        f"weights in {e.dtype}{head}, {e.storage}: {_size(e.file_bytes)}; dense {_size(e.dense_bytes)}",
    ]
    lines += [
        f"  stage {i}: keep {s.keep:.3f} ({s.parameters / 1e6:,.1f} M), reads {_size(s.read_bytes)} a token"
        for i, s in enumerate(e.stages)
    ]
    return [
        *lines,
        f"KV cache: {_size(e.kv_bytes)} for 1000 tokens; decoding with a context of {e.context}: "
        f"about {_size(e.memory_bytes)} of memory",
        f"compress on {tokens} tokens, on this machine: about {_size(cost.memory_bytes)} of memory, "
        f"{_size(cost.disk_bytes)} of disk in the cache folder, {_duration(cost.seconds)}",
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
