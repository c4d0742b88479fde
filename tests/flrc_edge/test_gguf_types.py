"""Every type that a GGUF's weights may have: what the gguf package makes of it, or a refusal from the header."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

from flrc_edge.errors import FormatError, UnsupportedModelError
from flrc_edge.gguf_file import convert_gguf, read_gguf

SHAPE = (64, 256)  # of blk.0.ffn_down.weight in a model of 256: one block of the longest types a row
NO_WEIGHTS = ("I8", "I16", "I32", "I64")
NAME, TARGET = "blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"


def readable() -> list[str]:
    """Return the names of the types that the installed package can dequantize."""
    names = []
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return names


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model whose MLP is 256 wide."""
    import shutil

    import torch
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parents[1] / "data" / "stories260k" / name, folder / name)
    return folder


def blocks(kind: GGMLQuantizationType) -> Any:
    """Return weights as the file holds them: quantized, or random blocks whose every scale is finite."""
    rng = np.random.default_rng(int(kind))
    try:
        return quantize(rng.standard_normal(SHAPE).astype(np.float32), kind)
    except NotImplementedError:
        size = GGML_QUANT_SIZES[kind][1] * (SHAPE[1] // GGML_QUANT_SIZES[kind][0])
        raw = rng.integers(0, 256, (SHAPE[0], size), dtype=np.uint8)
    for _ in range(100):
        with np.errstate(all="ignore"):
            values = dequantize(raw, kind)
        bad = ~np.isfinite(values).all(axis=1) | (np.abs(values).max(axis=1) > 1e6)
        if not bad.any():
            return raw
        raw[bad] = rng.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)
    raise AssertionError(kind)


@pytest.mark.parametrize("name", readable())
def test_every_type(name: str, wide: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    kind = GGMLQuantizationType[name]
    raw = blocks(kind)
    path = write_gguf(wide, tmp_path / "m.gguf", tensors={NAME: (raw, kind)})
    (folder := tmp_path / "out").mkdir()
    convert_gguf(read_gguf(path), folder)
    found = load_file(folder / "model.safetensors")[TARGET]
    assert found.dtype == np.float32 and found.shape == SHAPE and len(np.unique(found)) > 2
    assert np.array_equal(found, dequantize(raw, kind))


def test_types_that_this_table_is_about() -> None:
    """K, IQ, MXFP4 and ternary types are among those tried."""
    names = readable()
    assert {"Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "MXFP4", "TQ1_0"} <= set(
        names
    )
    assert len([name for name in names if name.startswith("IQ")]) == 9


def test_float64(wide: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weight = np.random.default_rng(0).standard_normal(SHAPE)
    path = write_gguf(wide, tmp_path / "m.gguf", tensors={NAME: weight})
    (folder := tmp_path / "out").mkdir()
    convert_gguf(read_gguf(path), folder)
    assert np.array_equal(load_file(folder / "model.safetensors")[TARGET], weight.astype(np.float32))


@pytest.mark.parametrize("name", sorted({k.name for k in GGMLQuantizationType} - {*readable(), "F64"}))
def test_types_that_cannot_be_read(
    name: str, wide: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    tensor: Any = np.zeros((SHAPE[0], SHAPE[1] // block * size), np.uint8)
    if name in NO_WEIGHTS:
        tensor = np.zeros(SHAPE, name.replace("I", "int").lower())
    path = write_gguf(wide, tmp_path / "m.gguf", tensors={NAME: (tensor, kind)})
    with pytest.raises(UnsupportedModelError, match=rf"{NAME} is {name}, which cannot be dequantized"):
        read_gguf(path)


def test_type_of_a_later_llama_cpp(wide: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = write_gguf(wide, tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(NAME.encode()) + len(NAME) + 4 + 16  # behind the name: dimensions, then the type
    path.write_bytes(data[:at] + struct.pack("<I", 199) + data[at + 4 :])
    with pytest.raises(UnsupportedModelError, match=rf"{NAME} is of type 199, which the installed gguf"):
        read_gguf(path)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_weights_that_are_not_finite(
    name: str, wide: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    kind = GGMLQuantizationType[name]
    raw = blocks(kind).copy()
    if name == "F32":
        raw[3, 3] = np.inf
    else:
        raw[3, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)  # the scale of a block
    path = write_gguf(wide, tmp_path / "m.gguf", tensors={NAME: (raw, kind)})
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match=rf"{NAME} holds a value that is not finite"):
        convert_gguf(read_gguf(path), folder)
