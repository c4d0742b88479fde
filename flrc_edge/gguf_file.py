"""A GGUF file as a plain Hugging Face folder: float32 safetensors, config in both spellings, tokenizer.json.

The header is read first and refuses what could not be converted faithfully, before a tensor is read: its own kind
here, numbers in gguf_config.py, tokens in gguf_vocabulary.py, tensors in gguf_tensors.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.errors import FormatError, UnsupportedModelError
from flrc_runtime.files import write_json

from .gguf_config import FAMILIES, config_of
from .gguf_header import GgufHeader, read_header
from .gguf_tensors import EMBEDDING, HEAD, check_tensors, dropped_matrix, hf_tensors
from .gguf_tokenizer import tokenizer_of
from .gguf_vocabulary import Vocabulary, read_vocabulary
from .tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONVERSION = 2  # counts what a conversion gives, so that folders of earlier ones are not taken for it
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class GgufModel:
    """A GGUF whose header was read: the ``config.json`` it means, its vocabulary and where its tensors lie."""

    path: Path
    config: dict[str, Any]
    header: GgufHeader
    vocabulary: Vocabulary
    dropped: str | None  # embedding or head, if the other one is the same matrix


def read_gguf(path: Path, *, tie: bool = False) -> GgufModel:
    """Read the header of a GGUF file.

    Args:
        path: The file.
        tie: Embedding and head of this file are known to be one matrix, rounded twice; keep the finer.

    Raises:
        FormatError: The file is truncated, not GGUF, or its parts do not fit together.
        UnsupportedModelError: A kind of file, family, tokenizer, tensor or key that cannot be converted
            faithfully.
    """
    header = read_header(path)
    _refuse_kind(header)
    vocabulary = read_vocabulary(header)
    rows = header.tensors[EMBEDDING].shape[0]
    if len(vocabulary.tokens) > rows:
        raise FormatError(
            f"{path.name}: the vocabulary has {len(vocabulary.tokens)} tokens, the embedding {rows} rows"
        )
    dropped = dropped_matrix(header, tie=tie)
    tied = dropped is not None or HEAD not in header.tensors
    config = config_of(header, vocabulary.special_ids(), tied=tied)
    check_tensors(header, DecoderConfig.from_hf(config), dropped=dropped)
    return GgufModel(path, config, header, vocabulary, dropped)


def convert_gguf(model: GgufModel, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into ``folder``.

    Raises:
        FormatError: A value is not finite, or the parts of the tokenizer do not fit together.
    """
    from safetensors.numpy import save_file

    from .model_folder import check_weights

    tokenizer = _tokenizer(model)
    config = DecoderConfig.from_hf(model.config)
    tensors = dict(hf_tensors(model.header, config, dropped=model.dropped))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model.config)
    special = {key: model.config[key] for key in _SPECIAL_IDS if model.config.get(key) is not None}
    write_json(folder / "generation_config.json", special)
    save_tokenizer(tokenizer, folder)
    check_weights(folder, config)
    for path in folder.iterdir():
        path.chmod(0o644)


def _tokenizer(model: GgufModel) -> PreTrainedTokenizerFast:
    return tokenizer_of(model.vocabulary, model.path.name)


def _refuse_kind(header: GgufHeader) -> None:
    """Refuse a file that is no whole model of a family in the table."""
    name, fields = header.path.name, header.fields
    parts = fields.get("split.count")
    if isinstance(parts, int) and parts > 1:
        number = fields.get("split.no", 0)
        which = number + 1 if isinstance(number, int) else "?"
        raise UnsupportedModelError(
            f"{name} is part {which} of {parts} of a split GGUF",
            hint="merge the parts first: llama-gguf-split --merge FIRST_PART MERGED.gguf",
        )
    kind, family = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind == "adapter":
        raise UnsupportedModelError(
            f"{name} is an adapter ({fields.get('adapter.type', 'lora')}), not a model",
            hint="merge it into its model first: llama-export-lora -m MODEL --lora ADAPTER -o MERGED.gguf",
        )
    if kind != "model":
        raise UnsupportedModelError(f"{name} is a GGUF file of type {kind!r}, not a model of text")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModelError(
            f"{name}: GGUF architecture {family!r} is not supported",
            hint=f"supported: {', '.join(FAMILIES)}",
        )
    if not header.tensors:
        raise UnsupportedModelError(f"{name} holds a vocabulary only, no weights")
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{name}: the tensor {EMBEDDING} is missing or is no matrix")
