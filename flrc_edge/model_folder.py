"""What a folder is, and a check of a model's weights from the safetensors headers, without loading a tensor."""

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
_FLOATS = ("F64", "F32", "F16", "BF16")
# A relative path that stays inside the folder.
_SHARD = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors\Z")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED = 1 << 24  # bytes
# Buffers that old checkpoints carry and no model reads.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq\Z|.*\.attn\.(masked_)?bias\Z")


# What a folder that is no model may hold, and what it then is.
_OTHERS = (
    (
        "flrc.json",
        "is a folder that flrc-edge wrote, not a model to compress",
        "flrc-edge inspect shows what it holds",
    ),
    (
        "adapter_config.json",
        "holds an adapter (LoRA or the like), which is not applied",
        "merge it into its base model with peft (merge_and_unload), save that and compress it; of a whole model, "
        "move adapter_config.json away",
    ),
    ("model_index.json", "is a diffusion pipeline, not a language model", None),
    ("modules.json", "is a sentence-transformers model, not a causal language model", None),
    (
        "genai_config.json",
        "is a folder of onnxruntime-genai, whose weights are in ONNX graphs",
        "give the Hugging Face model it was made from",
    ),
    (
        "params.json",
        "is in the original format of Meta or Mistral",
        "give the repository in Hugging Face's format (its config.json has a model_type)",
    ),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file; ``start`` and ``size`` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path
    start: int


def folder_name(folder: Path) -> str:
    """Return what a model's folder is called; of a snapshot in the hub's cache, the repository's name."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def refuse_other_folders(folder: Path, *, name: str) -> None:
    """Refuse what is no model, by what it is.

    Args:
        folder: That was given, or its configuration alone.
        name: How the user calls it.

    Raises:
        FlrcError: It is one of those, or holds its model in a folder below.
    """
    for file, what, hint in _OTHERS:
        only = file in ("flrc.json", "adapter_config.json")  # beside a config.json, too
        if (folder / file).is_file() and (only or not (folder / "config.json").is_file()):
            raise FlrcError(f"{name} {what}", hint=hint)
    if not (folder / "config.json").is_file():
        below = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise FlrcError(
            f"{name} holds no config.json",
            hint=f"give one of the folders in it: {', '.join(below[:5])}"
            if below
            else "give the folder of a Hugging Face model, a hub id or a GGUF file",
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder.

    Raises:
        FlrcError: There are none, or only pickled weights.
        FormatError: The index is damaged or names a file that is missing.
    """
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file() and not single.is_file():
        names = listed_shards(folder)
        for name in names:
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


def listed_shards(folder: Path) -> list[str]:
    """Return the files that the index of a folder names.

    Raises:
        FormatError: The index is damaged, or names a file outside the folder.
    """
    raw = read_json(folder / INDEX)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise FormatError(f"{folder.name}/{INDEX} holds no weight_map")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if not _SHARD.match(name):
            raise FormatError(
                f"{folder.name}/{INDEX} names {name!r}, which is not a safetensors file of the folder"
            )
    return names


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
        tensors = {
            name: _tensor(entry, path, 8 + length) for name, entry in raw.items() if name != "__metadata__"
        }
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
    expected: dict[str, tuple[int, ...]] = {f"{p.name}.weight": p.shape for p in config.projections()}
    expected |= config.other_tensors()
    found = _with_prefix(_tensors(folder), expected)
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
    return sum(path.stat().st_size for path in weight_files(folder))


def follow_weights(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a configuration whose ``tie_word_embeddings`` is what the weights say, and what to say if it was not.

    A fine-tune may train a head of its own and keep the flag, or save none and lose it. transformers 5 goes by the
    weights, too.

    Args:
        folder: With the weights.
        config: Its ``config.json``; one that is silent on ties, of a family unknown here, is left as it is.

    Raises:
        FlrcError: See :func:`weight_files`.
    """
    says = config.get("tie_word_embeddings")
    if not isinstance(says, bool):
        return config, None
    found = _tensors(folder)
    embedding = found.get(_EMBEDDING, found.get(_EMBEDDING.removeprefix("model.")))
    head = found.get(_HEAD)
    tied = head is None or (says and embedding is not None and _same_bytes(embedding, head))
    if embedding is None or tied == says:
        return config, None
    flag, what = str(says).lower(), "a head of its own" if says else "no head"
    said = (
        f"config.json says tie_word_embeddings: {flag}, but the weights hold {what}; the weights are followed"
    )
    return {**config, "tie_word_embeddings": tied}, f"{folder.name}: {said}"


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        found |= read_header(path)
    return found


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape, a.size) != (b.dtype, b.shape, b.size):
        return False
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.start)
        other.seek(b.start)
        for start in range(0, a.size, _COMPARED):
            length = min(_COMPARED, a.size - start)
            if one.read(length) != other.read(length):
                return False
    return True


def _tensor(entry: Any, file: Path, data: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return TensorInfo(str(entry["dtype"]), shape, int(end) - int(start), file, data + int(start))


def _with_prefix(found: dict[str, TensorInfo], expected: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Add the ``model.`` that a checkpoint of the bare decoder leaves out."""
    if any(name in expected for name in found):
        return found
    return {f"model.{name}": info for name, info in found.items()}
