"""The command chat: piped lines, and a real terminal."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_runtime import conversation

PROMPT = "Once upon a time"
PROMPT_SECONDS = 1.0  # readline shows its prompt a moment before a signal wakes it


def chat(folder: Path, typed: str | bytes, *options: object) -> Result:
    arguments = ["chat", str(folder), "--max-tokens", "12", *map(str, options)]
    return CliRunner().invoke(group, arguments, input=typed)


def test_every_line_is_a_turn(talking: Path) -> None:
    done = chat(talking, f"{PROMPT}\n\nLily went\\\nto the park\n")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) >= 2 and ">" not in done.stdout
    alone = CliRunner().invoke(group, ["generate", str(talking), PROMPT, "--max-tokens", "12"])
    assert done.stdout.startswith(alone.stdout)


def test_footer_tells_what_was_read(talking: Path) -> None:
    done = subprocess.run(  # a process of its own: logging is set up once for stderr
        [sys.executable, "-m", "flrc_edge", "chat", talking, "--max-tokens", "12"],
        input=f"{PROMPT}\nLily went\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stderr.splitlines()
    assert re.match(
        r"\[12 tokens \(stage 0: 8, stage 1: 4\), keep \d\.\d\d, [\d.]+ tok/s; 5 of 5 prompt tokens read; "
        r"16 of 512 positions\]$",
        first,
    )
    read, whole = (int(n) for n in second.split("; ")[1].split(" prompt")[0].split(" of "))
    assert read < whole - 10


def test_commands(talking: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    typed = [
        "/system You tell stories.", PROMPT, "/stage 1", "Lily went", f"/save {saved}", "/undo", "Lily went", "/help",
    ]  # fmt: skip
    done = chat(talking, "\n".join(typed))
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    content = json.loads(saved.read_text())
    assert [m["role"] for m in content["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert content["model"] == "stories260k" and f"{saved} holds 5 messages" in done.stderr
    assert content["messages"][-1]["content"].splitlines()[0] in lines[-1] + lines[-2]
    assert "/undo        take back" in done.stderr
    again = chat(
        talking, f"/undo\nLily went\n/save {tmp_path / 'again.json'}\n", "--load", saved, "--stage", 1
    )
    assert again.exit_code == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["messages"][:4] == content["messages"][:4]
    loaded = chat(talking, f"/load {saved}\n/reset\n{PROMPT}\n/quit\nnever read\n")
    assert loaded.stdout == chat(talking, f"{PROMPT}\n").stdout


@pytest.mark.parametrize("during", ["decode", "checked_request"])
def test_ctrl_c_before_the_first_token(talking: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    once = chat(talking, f"{PROMPT}\n")
    real, interrupted = getattr(conversation, during), []

    def first_interrupted(*arguments: Any, **options: Any) -> Any:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(conversation, during, first_interrupted)
    done = chat(talking, f"Lily went\n{PROMPT}\n")
    assert done.exit_code == 0 and "the question is forgotten" in done.stderr
    assert interrupted and done.stdout.lstrip("\n") == once.stdout


def said(saved: Path) -> list[str]:
    return [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]


def test_turns_of_several_lines(talking: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    typed = [
        '"""Lily', "", "  went \\", 'home."""  ', "A\\", 'B """', '"""one"""', '""""""', '"""', "/quit", '"""',
        '"""never closed',
    ]  # fmt: skip
    done = chat(talking, "\n".join(typed), "--save", saved)
    assert done.exit_code == 0, done.stderr
    assert "there is no command" not in done.stderr
    assert said(saved) == ["Lily\n\n  went \\\nhome.", 'A\nB """', "one"]


def test_a_conversation_is_saved_when_it_ends(talking: Path, tmp_path: Path) -> None:
    saved, silent = tmp_path / "talk.json", tmp_path / "silent.json"
    done = chat(talking, f"{PROMPT}\n/quit\n", "--save", saved)
    assert done.exit_code == 0 and said(saved) == [PROMPT] and f"{saved} holds 2 messages" in done.stderr
    before = saved.read_bytes()
    refused = chat(talking, "x\n", "--save", saved)
    assert refused.exit_code == 2 and "exists already" in refused.stderr and not refused.stdout
    nowhere = chat(talking, "x\n", "--save", tmp_path / "no" / "talk.json")
    assert nowhere.exit_code == 2 and "there is no folder" in nowhere.stderr
    broken = chat(talking, b"Lily went\n\xff\n", "--save", tmp_path / "half.json")
    assert broken.exit_code == 2 and said(tmp_path / "half.json") == ["Lily went"]
    assert chat(talking, "", "--save", silent, "--system", "x").exit_code == 0 and not silent.exists()
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/dance", "there is no command /dance"),
        ("/stage 9", "stage 9 is not one of the bundle's stages 0 to 1"),
        ("/stage one", "/stage takes a number or the word schedule"),
        ("/system", "/system needs a text"),
        ("/undo", "nothing was said yet"),
        ("/save", "/save needs the name of a file"),
        ("/save /", "exists already"),
        ("/save no/such/folder/x", "cannot be written"),
        ("/load nothing.json", "nothing.json is missing"),
        ("word " * 600, "leaves no room for an answer"),
    ],
)
def test_mistakes_are_a_sentence_and_the_talk_goes_on(talking: Path, typed: str, message: str) -> None:
    done = chat(talking, f"{typed}\n{PROMPT}\n")
    assert done.exit_code == 0 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == chat(talking, f"{PROMPT}\n").stdout


def test_refused(talking: Path, bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    (tmp_path / "other.json").write_text("[1]")
    for arguments, message in (
        ((talking, "x", "--stage", 1, "--mean-keep", 0.9), "exclude each other"),
        ((talking, "x", "--load", tmp_path / "bad.json"), "must take turns"),
        ((talking, "x", "--load", tmp_path / "other.json"), "holds no messages"),
        ((talking, "x", "--load", tmp_path / "bad.json", "--system", "x"), "exclude each other"),
        ((talking, b"\xff\n"), "not UTF-8 text at byte 0 of a line"),
        ((bundle.folder, "x"), "has no chat template"),
    ):
        done = chat(*arguments)  # type: ignore[arg-type]
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


# The whole program, but that stories260k would have said everything before a key could be hit.
SLOW = """
import sys, time
from flrc_runtime import conversation
decode = conversation.decode
def slow(*arguments):
    for token in decode(*arguments):
        time.sleep(0.05)
        yield token
conversation.decode = slow
from flrc_edge.cli import main
main()
"""


def own_terminal() -> None:
    """Take stdin as the terminal whose keys send signals; a job in the background would ignore Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, folder: Path, *options: object) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "chat", str(folder), *map(str, options)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Return what was shown up to ``text``, and forget it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} did not come: {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += self._decoder.decode(os.read(self._master, 4096))
        before, _, self.shown = self.shown.partition(text)
        return before

    def leave(self) -> int:
        self.type("\x04")
        return self.process.wait(timeout=30)


@pytest.fixture
def terminal(talking: Path, tmp_path: Path) -> Iterator[Terminal]:
    """With answers that end only when they are stopped."""
    found = Terminal(talking, "--max-tokens", 480, "--history", tmp_path / "history")
    yield found
    if found.process.poll() is None:
        found.process.send_signal(signal.SIGKILL)
        found.process.wait()
    assert PROMPT in (tmp_path / "history").read_text()


def test_ctrl_c_ends_the_answer_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type(f"{PROMPT}\r")
    terminal.wait_for("Hello")
    terminal.type("\x03")
    terminal.wait_for("positions]")
    terminal.wait_for("> ")
    terminal.type("Lily\\\r")
    terminal.wait_for("… ")
    time.sleep(PROMPT_SECONDS)
    terminal.type("\x03")  # drops the unfinished turn
    terminal.wait_for("> ")
    terminal.type("Lily went\r")
    terminal.wait_for("Lily went")
    terminal.wait_for(" ")
    terminal.type("\x03")
    assert "read" in terminal.wait_for("positions]")
    terminal.wait_for("> ")
    assert terminal.leave() == 0


def test_ctrl_c_where_nothing_runs_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type(f"{PROMPT}\r")
    terminal.wait_for("Hello")
    terminal.type("\x03")
    terminal.wait_for("positions]")
    terminal.wait_for("> ")
    time.sleep(PROMPT_SECONDS)
    terminal.type("\x03")
    terminal.wait_for("Interrupted.")
    assert terminal.process.wait(timeout=30) == 130
