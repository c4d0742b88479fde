"""``flrc-edge bench``: prompt and decode speed of every stage of a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flrc_edge.cli.progress_bar import from_context
from flrc_edge.cli.settings import parse_integers
from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_runtime.bench import BenchResult


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE…", type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    default=None,
    metavar="PATH",
    help="What all are compared with: another bundle, or a peer as NAME=PATH; without it the first BUNDLE.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME=PATH",
    help="Another program to measure (repeatable): genai=FOLDER is onnxruntime-genai, llama.cpp=FILE.gguf is "
    "llama.cpp, through the llama-bench on the PATH, with --threads and with one.",
)
@click.option(
    "-p", "--prompt-tokens", default="64", show_default=True, metavar="N,N,…", help="Tokens to read."
)
@click.option(
    "-c",
    "--context",
    default="64",
    show_default=True,
    metavar="N,N,…",
    help="Tokens in the cache when decoding begins.",
)
@click.option(
    "-n", "--decode-tokens", type=int, default=32, show_default=True, help="Tokens to make in a repetition."
)
@click.option("-r", "--repetitions", type=int, default=8, show_default=True, help="Of every test.")
@click.option("--threads", type=int, default=None, metavar="N", help="Of one operator.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    default=None,
    help="File whose beginning is the prompt; random tokens without it.",
)
@click.option(
    "--speculative", is_flag=True, help="Measure stage 0 with drafts of the last stage as well; needs --text."
)
@click.option("--loading", is_flag=True, help="Measure the first token after a start, and memory, as well.")
@click.option(
    "--busy",
    type=int,
    default=0,
    metavar="N",
    help="Decode beside N processes that keep processors busy as well.",
)
@click.option("--operators", is_flag=True, help="Say which operators a decode step spends its time on.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Output.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=None,
    help="Put the result into this JSON file and its .md page.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def command(
    bundles: tuple[Path, ...],
    baseline: str | None,
    peers: tuple[str, ...],
    prompt_tokens: str,
    context: str,
    decode_tokens: int,
    repetitions: int,
    threads: int | None,
    text: Path | None,
    speculative: bool,
    loading: bool,
    busy: int,
    operators: bool,
    form: str,
    save: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast each stage of each BUNDLE reads a prompt and decodes.

    All stages, the baseline and peers take turns, step by step, so that whatever disturbs the machine disturbs all
    alike. The ratio is a time over that of the baseline's stage 0 in the same turn: the median, and its 95 % interval.
    """
    from flrc_runtime import Speculation
    from flrc_runtime.bench import bench
    from flrc_runtime.bench.table import as_csv, as_markdown
    from flrc_runtime.bench.table import as_json as to_json

    with from_context() as progress:
        result = bench(
            bundles,
            baseline=None if baseline is None else _baseline(baseline),
            peers=[_peer(peer) for peer in peers],
            prompt_tokens=parse_integers(prompt_tokens),
            contexts=parse_integers(context),
            decode_tokens=decode_tokens,
            text=None if text is None else _read(text),
            speculation=Speculation() if speculative else None,
            repetitions=repetitions,
            threads=threads,
            loading=loading,
            operators=operators,
            busy=busy,
            progress=progress,
        )
    if save is not None:
        _save(save, bundles[0], result)
    render = to_json if as_json or form == "json" else as_csv if form == "csv" else as_markdown
    click.echo(render(result))


def _baseline(text: str) -> Path | tuple[str, Path]:
    from flrc_runtime.bench.peers import NAMES

    return _peer(text) if text.partition("=")[0] in NAMES else Path(text)


def _peer(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--peer {text!r} is not NAME=PATH", hint="for instance genai=FOLDER")
    return name, Path(path)


def _save(path: Path, bundle: Path, result: BenchResult) -> None:
    """Put the result beside the other figures; this alone needs the compressor's packages."""
    from flrc_edge.report import save
    from flrc_runtime.bundle import open_bundle

    save(path, "speed", open_bundle(bundle).manifest.model.name, asdict(result))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
