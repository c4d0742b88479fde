"""GGUF files: the logits of the folder they were written from; one sentence for what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.errors import FormatError, UnsupportedModelError
from flrc_edge.gguf_file import read_gguf
from flrc_edge.models import open_model, resolve_model

TEXT = "Once upon a time, there was a little girl named Lily."


def test_round_trip(stories: Path, write_gguf: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    path = write_gguf(stories, tmp_path / "stories.gguf")
    original, read = open_model(str(stories)), open_model(str(path))
    assert read.name == "stories"
    assert read.path.parent == cache / "gguf"
    assert read.config == original.config
    ids = original.tokenizer(TEXT).input_ids
    assert read.tokenizer(TEXT).input_ids == ids
    with torch.no_grad():
        expected, found = original.model(torch.tensor([ids])).logits, read.model(torch.tensor([ids])).logits
    assert torch.equal(found, expected)
    files = {p.name for p in read.path.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((read.path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    written = (read.path / "model.safetensors").stat().st_mtime_ns
    assert open_model(str(path)).path == read.path
    assert (read.path / "model.safetensors").stat().st_mtime_ns == written  # converted once


def test_tied_head_that_is_stored_twice(
    stories: Path, write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(stories, tmp_path / "twice.gguf", doubled_head=True)
    read, original = open_model(str(path)), open_model(str(stories))
    assert read.config.tied_embedding
    assert read.config.parameters() == original.config.parameters()
    # the float32 head is kept, not its float16 copy
    assert torch.equal(read.model.get_input_embeddings().weight, original.model.get_input_embeddings().weight)


def test_untied_head_stays(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    folder = family_model("llama")
    read = open_model(str(write_gguf(folder, tmp_path / "untied.gguf")))
    assert not read.config.tied_embedding
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(read.model(ids).logits, open_model(str(folder)).model(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "GGUF architecture 'gpt2' is not supported"),
        ({"architecture": "gemma3n"}, "GGUF architecture 'gemma3n' is not supported"),
        ({"extra": {"expert_count": 8}}, "mixtures of experts"),
    ],
)
def test_unsupported_gguf(
    options: dict[str, Any], message: str, stories: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(stories, tmp_path / "other.gguf", **options)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(str(path))


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    for content in (b"", b"hello, this is no model", b"gguf" * 100):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"notes.gguf is not a GGUF file"):
            resolve_model(str(path))


def test_truncated_gguf(stories: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_gguf(stories, tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (4, 10, 24, 100, 1000, 5000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(FormatError, match=r"cut.gguf is truncated or damaged"):
            read_gguf(path)
    path.write_bytes(whole[:16] + b"\xff" * 64 + whole[80:])
    with pytest.raises(FormatError, match=r"cut.gguf is truncated or damaged"):
        read_gguf(path)
