"""The command line. Each command is one module, imported only when it is called, so ``--help`` is instant."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from flrc_edge import __version__
from flrc_edge.errors import FlrcError

# Name of the command -> its line in --help; the module of the same name holds the click command `command`.
COMMANDS = {
    "demo": "The whole way on a built-in model: compress, export, and stream an answer.",
    "pull": "Download a built-in model, or a checkpoint or bundle from a hub.",
    "estimate": "Say what a compressed model will take, from its config.json alone.",
    "compress": "Compress a model into a checkpoint of nested low-rank factors.",
    "heal": "Train a checkpoint's factors for a while to answer as the dense model does.",
    "quantize": "Round a checkpoint to integers that make up for their rounding errors.",
    "export": "Export a checkpoint into a bundle: one ONNX graph per stage, one weight file.",
    "generate": "Stream an answer from a bundle.",
    "chat": "Talk to a bundle in the terminal.",
    "serve": "Serve a bundle to clients of OpenAI's API.",
    "place": "Say where an accelerator runs a bundle, and how exactly.",
    "bench": "Measure prompt and decode speed of every stage of a bundle.",
    "eval": "Measure perplexity, divergence from the dense model, and summaries.",
    "compare": "Compare recipes (baselines, scores, factors), or number formats, by perplexity.",
    "inspect": "Show what a checkpoint or bundle holds.",
    "report": "Draw the rank map of a checkpoint or bundle into one HTML page.",
    "push": "Upload a checkpoint or bundle to a hub.",
    "verify": "Compare every file of a checkpoint or bundle with its checksum.",
    "doctor": "Look at what this machine has and lacks.",
}
# Package -> the extra of pyproject.toml that brings it, where that is less than all of them.
_EXTRAS = {
    "huggingface_hub": "hub",
    "filelock": "hub",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "matplotlib": "report",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"flrc_edge.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Turn the project's own errors, and a package that is not installed, into one sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except FlrcError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if ctx.params.get("debug") or error.name is None or error.name.startswith("flrc"):
                raise
            click.echo(
                f"Error: this command needs the package {error.name}, which is not installed", err=True
            )
            click.echo(f"Hint: pip install 'flrc-edge[{_EXTRAS.get(error.name, 'all')}]'", err=True)
            ctx.exit(1)
        except Exception as error:
            if ctx.params.get("debug") or not _ran_out_of_memory(error):
                raise
            click.echo("Error: memory ran out, and the system gave no more", err=True)
            click.echo(
                "Hint: end other programs; flrc-edge estimate says what compressing takes, which a smaller --window "
                "lowers, as a smaller --context does for decoding",
                err=True,
            )
            ctx.exit(1)


def _ran_out_of_memory(error: Exception) -> bool:
    """Tell an allocation that failed from a fault of ours: torch and onnxruntime have no type of their own for it."""
    return isinstance(error, MemoryError) or any(
        words in str(error)
        for words in (
            "DefaultCPUAllocator",
            "Cannot allocate memory",
            "Failed to allocate memory",
            "bad_alloc",
        )
    )


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="flrc-edge")
@click.option("--debug", is_flag=True, help="Show a traceback and debug messages.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def group(debug: bool, quiet: bool) -> None:
    """Turn a language model into nested low-rank ONNX graphs and decode it on this machine.

    stdout is the result, stderr is progress. Exit codes: 0 ok, 1 error, 2 usage, 3 verification failed,
    130 interrupted, 143 terminated.
    """
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for name in ("flrc_edge", "flrc_exporters", "flrc_runtime"):
        logging.getLogger(name).setLevel(level)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; Ctrl-C is 130.

    Args:
        arguments: Without the program's name; None for those of this process.

    Raises:
        SystemExit: 143, for SIGTERM, after everything was cleaned up.
    """
    try:
        with _terminable():
            code = group.main(
                args=arguments, prog_name=None if arguments is None else "flrc-edge", standalone_mode=False
            )
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code if isinstance(code, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line of this process and end it."""
    code = run()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # a process of `accelerate launch`: threads of torch's process group abort some of them in the interpreter's
        # teardown ("terminate called without an active exception"), when all work is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
