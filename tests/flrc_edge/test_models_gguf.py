"""GGUF files: the logits of the folder they were written from; one sentence for a file that is no such model."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flrc_edge.errors import FlrcError, FormatError, UnsupportedModelError
from flrc_edge.gguf_file import convert_gguf, read_gguf
from flrc_edge.models import open_model, resolve_model

TEXT = "Once upon a time, there was a little girl named Lily."


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return open_model(str(folder)).model(torch.arange(30)[None]).logits


def embedding(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_families(
    family: str,
    family_model: Callable[[str], Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    folder = family_model(family)
    path = write_gguf(folder, tmp_path / "m.gguf", architecture=family)
    assert torch.equal(logits(path), logits(folder))


def test_biases_of_some_projections(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """llama.cpp adds each bias that is there; Hugging Face's llama has all four or none."""
    bias = {"blk.0.attn_v.bias": np.arange(64, dtype=np.float32) / 64}
    path = write_gguf(family_model("llama"), tmp_path / "bias.gguf", tensors=bias)
    read = open_model(str(path)).model.model.layers
    assert torch.equal(read[0].self_attn.v_proj.bias, torch.arange(64) / 64)
    assert not read[0].self_attn.o_proj.bias.any() and not read[1].self_attn.v_proj.bias.any()


def test_head_that_is_the_embedding_bit_for_bit(
    stories: Path, write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(stories, tmp_path / "twice.gguf", tensors={"output.weight": embedding(stories)})
    read, original = open_model(str(path)), open_model(str(stories))
    assert read.config.tied_embedding and read.config.parameters() == original.config.parameters()


def test_a_head_that_differs_is_kept(
    stories: Path, write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """One bit is enough, and so is another rounding; only who knows of a file may say that it is tied."""
    weight = embedding(stories)
    bit = weight.copy()
    bit[-1, -1] = np.nextafter(bit[-1, -1], np.float32(9))
    rounded = weight.astype(np.float16)
    for name, head in (("bit", bit), ("rounded", rounded)):
        path = write_gguf(stories, tmp_path / f"{name}.gguf", tensors={"output.weight": head})
        read = open_model(str(path))
        assert not read.config.tied_embedding
        assert np.array_equal(read.model.get_output_embeddings().weight.detach().numpy(), head)
        assert np.array_equal(read.model.get_input_embeddings().weight.detach().numpy(), weight)
    for name, finer in (("token_embd.weight", rounded), ("output.weight", rounded)):
        both = {"token_embd.weight": weight, "output.weight": weight, name: finer}
        model = read_gguf(write_gguf(stories, tmp_path / f"{name}.gguf", tensors=both), tie=True)
        (folder := tmp_path / f"tied-{name}").mkdir()
        convert_gguf(model, folder)
        assert np.array_equal(embedding(folder), weight) and model.config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "GGUF architecture 'gpt2' is not supported"),
        ({"architecture": "gemma3n"}, "GGUF architecture 'gemma3n' is not supported"),
        (
            {"fields": {"split.count": ("uint16", 3), "split.no": ("uint16", 1)}},
            "m.gguf is part 2 of 3 of a split GGUF",
        ),
        (
            {"fields": {"general.type": ("string", "adapter"), "adapter.type": ("string", "lora")}},
            r"m.gguf is an adapter \(lora\), not a model",
        ),
        ({"fields": {"general.type": ("string", "imatrix")}}, "of type 'imatrix', not a model of text"),
        (
            {"tensors": {"blk.0.attn_qkv.weight": np.zeros((8, 64), "f4")}},
            "blk.0.attn_qkv.weight has no place",
        ),
        ({"tensors": {"blk.7.attn_q.weight": np.zeros((64, 64), "f4")}}, "blk.7.attn_q.weight has no place"),
        ({"tensors": {"blk.0.ffn_up.bias": np.zeros(172, "f4")}}, "blk.0.ffn_up.bias has no place"),
    ],
)
def test_unsupported_gguf(
    options: dict[str, Any], message: str, stories: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf", **options)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_down.weight": None}, "the tensor of model.layers.1.mlp.down_proj.weight is missing"),
        ({"blk.1.ffn_down.weight": np.zeros((64, 64), "f4")}, r"is \[64, 64\], the header says \[64, 172\]"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        (
            {"token_embd.weight": np.zeros((500, 64), "f4")},
            "vocabulary has 512 tokens, the embedding 500 rows",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_work(
    tensors: dict[str, Any], message: str, stories: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read_gguf(write_gguf(stories, tmp_path / "m.gguf", tensors=tensors))


def test_vocabulary_alone(stories: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    names = [t.name for t in read_gguf(write_gguf(stories, tmp_path / "m.gguf")).header.tensors.values()]
    path = write_gguf(stories, tmp_path / "v.gguf", tensors=dict.fromkeys(names))
    with pytest.raises(UnsupportedModelError, match=r"v.gguf holds a vocabulary only, no weights"):
        resolve_model(str(path))


def test_versions_and_byte_orders(stories: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_gguf(stories, tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "v.gguf"
    path.write_bytes(whole[:4] + struct.pack("<I", 2) + whole[8:])  # the layout of 3
    assert read_gguf(path).config["hidden_size"] == 64
    for version in (1, 4):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        with pytest.raises(UnsupportedModelError, match=rf"v.gguf is of GGUF version {version}"):
            resolve_model(str(path))
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(UnsupportedModelError, match=r"v.gguf is a big-endian GGUF file"):
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


def test_damaged_headers_are_named(stories: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever a byte of the header says, reading it ends in a model or in one sentence that can be printed."""
    whole = write_gguf(stories, tmp_path / "whole.gguf").read_bytes()
    path, rng = tmp_path / "m.gguf", random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(8, rng.choice((1200, 20_000)))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            read_gguf(path)
        except FlrcError as error:
            refused += bool(str(error).encode())
    assert refused > 50
