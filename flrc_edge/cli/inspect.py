"""``flrc-edge inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from flrc_edge.cli.stage_text import schedule_text
from flrc_runtime import manifest
from flrc_runtime.manifest import KIND_NAMES, Manifest


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--ranks", is_flag=True, help="List the ranks of every projection.")
@click.option("--json", "as_json", is_flag=True, help="Print flrc.json.")
def command(folder: Path, ranks: bool, as_json: bool) -> None:
    """Show what the checkpoint or bundle FOLDER holds."""
    content = manifest.read(folder)
    if as_json:
        click.echo(json.dumps(asdict(content), indent=1))
        return
    for line in _summary(folder, content):
        click.echo(line)
    if ranks:
        for p in content.plan.projections:
            shown = "dense" if p.dense else " > ".join(str(r) for r in p.ranks)
            (m, n), most = p.shape, manifest.break_even(p.shape, storage=p.storage)
            click.echo(f"  {p.name:<44} {m:>5} x {n:<5}  {shown}  (break-even {most})")


def _ends(folder: Path, content: Manifest) -> str:
    """Return the tokens that end an answer, by name where the folder says what they are called."""
    from flrc_runtime.errors import FlrcError
    from flrc_runtime.tokenizer import Tokenizer

    numbers = content.model.eos_token_ids
    if not numbers:
        return "no token: they run to --max-tokens"
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except FlrcError:  # inspect shows damaged folders, too
        return ", ".join(f"token {i}" for i in numbers)
    return ", ".join(f"{tokenizer.token_text(i)} ({i})" for i in numbers)


def _cache(folder: Path, content: Manifest) -> str:
    """Return in which numbers keys and values are kept, of a bundle of our own operators whose graph can be read."""
    from flrc_runtime.errors import FlrcError
    from flrc_runtime.files import resolve_inside
    from flrc_runtime.graph_file import cache_numbers

    if not content.operators:
        return ""
    try:
        numbers = cache_numbers(resolve_inside(folder, content.stages[0].graph))
    except (FlrcError, OSError):  # inspect shows damaged folders, too
        return ""
    return f"; keys and values are kept in {numbers}" if numbers else ""


def _summary(folder: Path, content: Manifest) -> list[str]:
    model, plan, schedule = content.model, content.plan, content.schedule
    size = sum(f.size for f in content.files.values())
    lines = [
        f"{KIND_NAMES[content.kind]} of {model.name} ({model.architecture}, {model.parameters / 1e6:.1f} M "
        "parameters), "
        f"{content.dtype}, {size / 1e6:.1f} MB in {len(content.files) + 1} files",
        f"allocator {plan.allocator}, factors {content.factorization}, "
        f"{sum(p.dense for p in plan.projections)} of {len(plan.projections)} projections dense",
    ]
    lines.append(f"answers end at {_ends(folder, content)}{_cache(folder, content)}")
    if content.calibration is not None:
        texts = ", ".join(f"{t.name} ({t.tokens} tokens)" for t in content.calibration.texts)
        lines.append(f"calibrated on {texts}, seed {content.calibration.seed}")
    if plan.num_stages > 1:
        lines.append(schedule_text(schedule, stages=plan.num_stages, context=model.context_length))
    for s in range(plan.num_stages):
        first = schedule.first_token(s, model.context_length)
        when = "never used by the schedule" if first is None else f"from token {first}"
        line = f"  stage {s}: keep {plan.kept(s):.3f} ({plan.activated(s) / 1e6:.1f} M), {when}"
        if content.stages:
            line += f", {content.stages[s].graph}, reads {content.stages[s].bytes / 1e6:.1f} MB a token"
        if schedule.divergence:
            row = schedule.divergence[s]
            line += f", KL to dense {sum(row) / len(row):.3f} nats"
        lines.append(line)
    return lines
