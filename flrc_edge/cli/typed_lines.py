"""What a user types, or pipes: one turn after the other, with line editing where python has it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from flrc_edge.errors import UsageError

QUOTES = '"""'


def turns() -> Iterator[str]:
    """Yield what is typed: a line with those that a backslash joins to it, or all that stands between triple quotes.

    Ctrl-C drops the lines of a turn that is not finished.

    Raises:
        Abort: Ctrl-C where there are none.
        UsageError: stdin is no text.
    """
    lines: list[str] = []
    quoted = False
    while True:
        try:
            line = _line("… " if lines else "> ")
        except KeyboardInterrupt:
            click.echo(err=True)
            if not lines:
                raise click.Abort from None
            lines, quoted = [], False
            continue
        if line is not None:
            if not lines and line.startswith(QUOTES):
                quoted, line = True, line.removeprefix(QUOTES)
            line, goes_on = _ended(line, quoted=quoted)
            lines.append(line)
            if goes_on:
                continue
        if lines:
            yield "\n".join(lines).strip("\n") if quoted else "\n".join(lines)
        if line is None:
            return
        lines, quoted = [], False


@contextmanager
def history(path: Path | None) -> Iterator[None]:
    """Edit lines with the keys of a shell; keep what was typed in a file, if one is named.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        import readline
    except ImportError:  # python on Windows has none
        yield
        return
    if path is not None and path.exists():
        try:
            readline.read_history_file(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        yield
    finally:
        if path is not None:
            try:
                readline.write_history_file(path)
            except OSError as error:
                click.echo(f"{path} could not be written: {error.strerror or error}", err=True)


def _ended(line: str, *, quoted: bool) -> tuple[str, bool]:
    """Return a line without the mark at its end, and whether its turn goes on in the next one."""
    if not quoted:
        return line.removesuffix("\\"), line.endswith("\\")
    text = line.rstrip()
    return (text.removesuffix(QUOTES), False) if text.endswith(QUOTES) else (line, True)


def _line(prompt: str) -> str | None:
    """Return the next line of stdin, None at its end."""
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            click.echo(err=True)
            return None
    data = sys.stdin.buffer.readline()
    try:
        return data.decode("utf-8").rstrip("\r\n") if data else None
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text at byte {error.start} of a line") from None
