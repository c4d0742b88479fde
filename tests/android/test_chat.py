"""The Java engine writes the prompt of a conversation as the model's chat template does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flrc_exporters.bundle import export
from flrc_runtime import manifest
from flrc_runtime.tokenizer import read_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '[' + m['role'] + ']' + m['content'] | trim + '[end]' }}{% endfor %}[answer]"
)
WORDS = [
    "Why?",
    " \u00a0\u2003 spaces \x1f\x85\n",
    '"quotes" \\ <|im_end|>',
    "日本語 👩‍👩‍👧",
    "\n\n",
    "x",
    "last",
]


def exported(checkpoint: Path, template: str | None, folder: Path) -> Path:
    """Export a checkpoint whose model has this chat template."""
    own = folder / "checkpoint"
    shutil.copytree(checkpoint, own)
    (own / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (own / "chat_template.jinja").write_text(template, "utf-8")
    manifest.seal(own, replace(manifest.parse(own), files={}))
    export(own, folder / "bundle", dtype="fp32")
    return folder / "bundle"


def turns(count: int, *, system: bool = False) -> list[dict[str, str]]:
    found = [{"role": ("user", "assistant")[i % 2], "content": WORDS[i % len(WORDS)]} for i in range(count)]
    return [{"role": "system", "content": " Be brief. "}, *found] if system else found


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
def test_prompts_are_those_of_the_template(
    java: Callable[..., Any], compressed_stories: Any, tmp_path: Path, template: str
) -> None:
    bundle = exported(compressed_stories.checkpoint, template, tmp_path)
    assert "chat_frames.json" in manifest.verify(bundle, "bundle").files
    asked = [turns(count, system=system) for count in (1, 3, 7) for system in (False, True)]
    done = java("ChatCheck", bundle, stdin="".join(json.dumps(messages) + "\n" for messages in asked))
    assert done.returncode == 0, done.stderr
    python = read_template(bundle)
    assert python is not None
    assert [json.loads(line) for line in done.stdout.splitlines()] == [python.render(m) for m in asked]


def test_a_bundle_without_frames_has_none(
    java: Callable[..., Any], compressed_stories: Any, tmp_path: Path
) -> None:
    bundle = exported(compressed_stories.checkpoint, "{{ messages | length }}", tmp_path)
    done = java("ChatCheck", bundle, stdin=json.dumps(turns(1)) + "\n")
    assert (done.returncode, done.stdout) == (0, "null\n")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "cannot follow the beginning"),
        (["user", "user"], "cannot follow user"),
        (["user", "assistant"], "the last message is not the user's"),
        ([], "the last message is not the user's"),
    ],
)
def test_other_conversations_are_refused(
    java: Callable[..., Any], compressed_stories: Any, tmp_path: Path, roles: list[str], message: str
) -> None:
    bundle = exported(compressed_stories.checkpoint, CHATML, tmp_path)
    messages = [{"role": role, "content": "x"} for role in roles]
    done = java("ChatCheck", bundle, stdin=json.dumps(messages) + "\n")
    assert (done.returncode, message in done.stderr) == (3, True), done.stderr
