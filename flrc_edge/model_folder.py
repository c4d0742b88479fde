"""Check the weights of a Hugging Face folder from the safetensors headers alone, without loading a tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flrc_exporters.architectures import ModelShapes
from flrc_runtime.errors import FlrcError, FormatError, UnsupportedModelError
from flrc_runtime.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, the bound of the safetensors format itself
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors\Z")
# Buffers that old checkpoints carry and no model reads.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq\Z|.*\.attn\.(masked_)?bias\Z")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors header; ``size`` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder.

    Raises:
        FlrcError: There are none, or only pickled weights.
        FormatError: The index is damaged or names a file that is missing.
    """
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file() and not single.is_file():
        raw = read_json(index)
        shards = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise FormatError(f"{folder.name}/{INDEX} holds no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not _SHARD.match(name):
                raise FormatError(
                    f"{folder.name}/{INDEX} names {name!r}, which is not a safetensors file of the folder"
                )
            if not (folder / name).is_file():
                raise FormatError(
                    f"{folder.name} is incomplete: {name} is missing ({len(names)} shards are listed)",
                    hint="download the model again",
                )
        return tuple(folder / name for name in names)
    if single.is_file():
        return (single,)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise FlrcError(
            f"{folder.name} holds only pickled weights ({pickled[0]}), which are never opened",
            hint="save the model as safetensors (model.save_pretrained writes it)",
        )
    raise FlrcError(f"{folder} holds no {SINGLE}", hint="give the folder of a Hugging Face model")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file and check that the file is as long as it says.

    Raises:
        FormatError: The file is truncated or not safetensors.
    """
    where = f"{path.parent.name}/{path.name}"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise FormatError(
                f"{where} is truncated or not a safetensors file", hint="download the model again"
            )
        data = file.read(length)
    try:
        raw = json.loads(data)
        tensors = {name: _tensor(entry) for name, entry in raw.items() if name != "__metadata__"}
        end = max(
            (entry["data_offsets"][1] for name, entry in raw.items() if name != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise FormatError(f"{where} has a damaged header", hint="download the model again") from None
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise FormatError(f"{where} is {state}: {size} of {expected} bytes", hint="download the model again")
    return tensors


def check_weights(folder: Path, config: ModelShapes) -> int:
    """Check that the folder holds every tensor of ``config`` with its shape, and none that would be ignored.

    Args:
        folder: A Hugging Face folder.
        config: What the folder's ``config.json`` says.

    Returns:
        The size of the weight files in bytes.

    Raises:
        FormatError: A file is truncated, or a tensor is missing or has another shape.
        UnsupportedModelError: A tensor is not one of this family, or is not float32, float16 or bfloat16.
    """
    files = weight_files(folder)
    found: dict[str, TensorInfo] = {}
    for path in files:
        found |= read_header(path)
    expected: dict[str, tuple[int, ...]] = {f"{p.name}.weight": p.shape for p in config.projections()}
    expected |= config.other_tensors()
    found = _with_prefix(found, expected)
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{folder.name}: the weights hold no {name}, which config.json calls for")
        info = found[name]
        if info.shape != shape:
            raise FormatError(f"{folder.name}: {name} is {list(info.shape)}, config.json says {list(shape)}")
        if info.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{folder.name}: {name} is stored as {info.dtype}; quantized weights are refused",
                hint="give the float model",
            )
    tied = {"lm_head.weight"} if config.tied_embedding else set()
    extra = sorted(n for n in found if n not in expected and n not in tied and not _IGNORED.match(n))
    if extra:
        raise UnsupportedModelError(
            f"{folder.name}: the tensor {extra[0]} has no place in this {config.architecture} configuration"
        )
    return sum(path.stat().st_size for path in files)


def _tensor(entry: Any) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(end) - int(start))


def _with_prefix(found: dict[str, TensorInfo], expected: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Add the ``model.`` that a checkpoint of the bare decoder leaves out."""
    if any(name in expected for name in found):
        return found
    return {f"model.{name}": info for name, info in found.items()}
