"""Progress on stderr: a bar with remaining time and peak memory on a terminal, a line per quarter otherwise."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

import click

from flrc_edge.progress import peak_rss_bytes

LABELS = {
    "load": "Loading the model",
    "measure": "Measuring every rank",
    "store": "Cutting factors into chunks",
    "quantize": "Rounding to integers",
    "input moments": "Moments of the inputs",
    "try number formats": "Trying number formats",
    "try formats of the head": "Trying formats of the head",
    "figures": "Drawing",
    "calibrate": "Calibrating",
    "factorize": "Factorizing",
    "answers": "Answering with the dense model",
    "schedule": "Measuring the stages",
    "perplexity": "Perplexity",
    "heal": "Healing",
    "weights": "Writing weights",
    "stages": "Building the stages' graphs",
    "check": "Comparing with the checkpoint",
}


class ProgressBars:
    """A progress callback that shows one bar a phase; use it as a context."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._phase: str | None = None
        self._bar: Any = None
        self._done = 0
        self._start = time.monotonic()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of ``phase`` are finished."""
        if self._quiet:
            return
        if phase != self._phase or done <= self._done:
            self._close()
            self._phase, self._done, self._start = phase, 0, time.monotonic()
            if sys.stderr.isatty():
                self._bar = click.progressbar(
                    length=total,
                    label=f"{LABELS.get(phase, phase):<32}",
                    file=sys.stderr,
                    show_pos=True,
                    item_show_func=lambda _: _memory(),
                )
                self._bar.__enter__()
        if self._bar is not None:
            self._bar.update(done - self._done, current_item=phase)
        elif done * 4 // total > self._done * 4 // total:
            seconds = time.monotonic() - self._start
            click.echo(f"{LABELS.get(phase, phase)}: {done}/{total}, {seconds:.0f} s, {_memory()}", err=True)
        self._done = done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _memory() -> str:
    return f"peak {peak_rss_bytes() / 2**30:.1f} GiB"


def from_context() -> ProgressBars:
    """Return the progress the command line asked for (``--quiet``)."""
    context = click.get_current_context(silent=True)
    root = context.find_root() if context else None
    helper = os.environ.get("RANK", "0") != "0"  # a process of `accelerate launch` that only helps
    return ProgressBars(quiet=helper or bool(root and root.params.get("quiet")))
