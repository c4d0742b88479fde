"""Gemma-3 and Qwen2 go the whole way with the commands that SmolLM2 goes, to a server's answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from flrc_edge.pull import is_pulled

pytestmark = pytest.mark.full
SIZES = ["--stages", ".9,.8,.7", "--boundaries", "8,16", "--storage", "pivoted", "--tokens", "2048"]


def flrc(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flrc_edge", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def done(*arguments: object, stdin: str | None = None) -> str:
    result = flrc(*arguments, stdin=stdin)
    assert result.returncode == 0, (arguments, result.stderr)
    return result.stdout


def served(bundle: Path, *, chat: bool) -> tuple[str, list[int]]:
    """The text and the stages of a streamed answer of 24 tokens at most, through the openai client."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flrc_edge", "serve", bundle, "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = re.search(r"http://\S+/v1", line := process.stderr.readline())
        assert found, line + process.stderr.read()
        client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0, timeout=120)
        model = client.models.list().data[0].id
        text, stages = "", []
        if chat:
            messages = [{"role": "user", "content": "Write a story about a fox."}]
            for chunk in client.chat.completions.create(  # type: ignore[call-overload]
                model=model, messages=messages, stream=True, max_tokens=24
            ):
                text += chunk.choices[0].delta.content or ""
                stages.append(getattr(chunk.choices[0], "stage", None))
        else:
            for chunk in client.completions.create(
                model=model, prompt="Once upon a time", stream=True, max_tokens=24
            ):
                text += chunk.choices[0].text
                stages.append(getattr(chunk.choices[0], "stage", None))
        return text, [s for s in stages if s is not None]
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(("name", "chats"), [("gemma-3-270m", False), ("qwen2.5-coder-0.5b", True)])
def test_the_whole_way(name: str, chats: bool, real_cache: Path, tmp_path: Path) -> None:
    if not is_pulled(name):
        pytest.skip(f"{name} is not in {real_cache}: flrc-edge pull {name}")
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    done("compress", name, "-o", checkpoint, *SIZES)
    done("export", checkpoint, "-o", bundle, "--dtype", "int8")
    answers(bundle, chats=chats)


def answers(bundle: Path, *, chats: bool) -> None:
    """Every way to ask a bundle answers, and moves to later stages."""
    done("verify", bundle)
    answer = json.loads(done("generate", bundle, "Write a story about a fox.", "--max-tokens", 24, "--json"))
    assert answer["answer"].strip()
    stages = answer["stage_of_token"]
    assert stages == sorted(stages) and stages[0] == 0 and 1 in stages
    text, stages = served(bundle, chat=chats)
    assert text.strip()
    assert stages == sorted(stages) and stages[0] == 0 and 1 in stages
    chat = flrc("chat", bundle, "--max-tokens", 16, stdin="Name three colours.\n")
    if chats:
        assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr
    else:  # a base model
        assert chat.returncode == 2
        assert "has no chat template" in chat.stderr and "flrc-edge generate" in chat.stderr
