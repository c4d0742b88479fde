"""Draw docs/images/chat.svg: a real chat with a bundle, typed into a terminal of its own.

``python docs/record_chat.py BUNDLE``; ``make docs-chat`` gives it the bundle of the demo.
"""

from __future__ import annotations

import io
import os
import sys
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROWS, COLUMNS = 200, 112
QUESTIONS = ("Why is the sky blue?", "And why is it red in the evening?")
OPTIONS = "--show-stages --max-tokens 96 --repetition-penalty 1.1"
DIM, GREY = b"\x1b[2m", b"\x1b[90m"  # pyte knows nothing dim
COLORS = {
    "default": "",
    "brown": "yellow",
    "brightblack": "#9a9a9a",
}  # pyte's names that rich has not, and rich's
# rich's own frame names fonts that a browser would load from elsewhere; this one asks for none.
FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" viewBox="0 0 {width} {height}" role="img">
<title>A chat in a terminal</title>
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; white-space: pre
}}
.{unique_id}-title {{ font: bold 18px sans-serif }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def recorded(bundle: str) -> pyte.Screen:
    """Type a chat with a bundle into a shell and return what the terminal shows."""
    screen = pyte.Screen(COLUMNS, ROWS)
    here = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PS1": "$ "
    }  # fmt: skip
    environment.pop("NO_COLOR", None)
    shell = pexpect.spawn(
        "bash", ["--norc", "--noprofile"], env=environment, dimensions=(ROWS, COLUMNS), timeout=300
    )
    shell.logfile_read = Tee(screen)
    shell.expect_exact("$ ")
    shell.sendline(f"flrc-edge chat {bundle} {OPTIONS}")
    for question in QUESTIONS:
        shell.expect_exact("> ")
        shell.sendline(question)
        shell.expect_exact("positions]")
    shell.expect_exact("> ")
    shell.sendeof()
    shell.expect_exact("$ ")
    shell.close()
    return screen


class Tee:
    """What pexpect reads goes to the screen as well."""

    def __init__(self, screen: pyte.Screen) -> None:
        self._stream = pyte.ByteStream(screen)

    def write(self, data: bytes) -> None:
        """Show some bytes."""
        self._stream.feed(data.replace(DIM, GREY))

    def flush(self) -> None:
        """Do nothing: all is shown at once."""


def drawn(screen: pyte.Screen) -> str:
    """Return the filled lines of a terminal as SVG."""
    lines = []
    for row in range(screen.cursor.y):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        runs = [("".join(c.data for c in run), color) for color, run in groupby(cells, key=lambda c: c.fg)]
        lines.append(Text.assemble(*((text, COLORS.get(color, color)) for text, color in runs)))
        lines[-1].rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("\n").join(lines), overflow="crop", no_wrap=True)
    return console.export_svg(title="flrc-edge chat", theme=MONOKAI, code_format=FRAME, unique_id="chat")


if __name__ == "__main__":
    picture = Path(__file__).parent / "images" / "chat.svg"
    picture.write_text(drawn(recorded(sys.argv[1])), "utf-8")
