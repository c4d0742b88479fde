"""A GGUF file as a plain Hugging Face folder: float32 safetensors, config in both spellings, tokenizer.json.

The header is read first and refuses what could not be converted faithfully. Tensors are dequantized with the
``gguf`` package and renamed here; the vocabulary goes through transformers' GGUF reader, with the
pre-tokenizer that reader loses put back.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.errors import FlrcError, FormatError, UnsupportedModelError
from flrc_runtime.files import write_json

from .hf_config import normalized_config
from .tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# general.architecture -> model_type; llama.cpp calls Mistral's files "llama" too.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)\Z")
# Byte-level vocabularies name their pre-tokenizer; one not listed would split text differently: refused.
_PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2")
# Two roundings of one matrix differ by a few percent, two different matrices by more than their size.
_SAME_MATRIX = 0.25
_DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, OSError, MemoryError)


@dataclass(frozen=True)
class GgufModel:
    """A GGUF whose header was read: the ``config.json`` it means, and its metadata and tensors by name."""

    path: Path
    config: dict[str, Any]
    fields: dict[str, Any]
    tensors: dict[str, Any]  # name -> gguf.ReaderTensor, memory-mapped
    head: str | None  # the tensor that is the embedding of a tied head stored twice


def read_gguf(path: Path) -> GgufModel:
    """Read the header of a GGUF file.

    Raises:
        FormatError: The file is truncated or not GGUF.
        UnsupportedModelError: A family, tokenizer or tensor that cannot be converted faithfully.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(
                f"{path.name} is not a GGUF file", hint="give a GGUF file or a Hugging Face folder"
            )
    try:
        reader = GGUFReader(path)
        skipped = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
        fields = {name: f.contents() for name, f in reader.fields.items() if name not in (*skipped, _TOKENS)}
        if _TOKENS in reader.fields:
            fields[_TOKENS] = len(reader.fields[_TOKENS].data)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except _DAMAGED as error:
        raise FormatError(
            f"{path.name} is truncated or damaged ({error})", hint="download the file again"
        ) from None
    model = GgufModel(path, {}, fields, tensors, None)
    _refuse(model)
    head = _doubled_head(model)
    config = normalized_config(_config(model, tied=head is not None or "output.weight" not in tensors))
    DecoderConfig.from_hf(config)
    return GgufModel(path, config, fields, tensors, head)


_TOKENS = "tokenizer.ggml.tokens"


def convert_gguf(model: GgufModel, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into ``folder``.

    Raises:
        FormatError: The tensors are not those its header calls for.
    """
    from safetensors.numpy import save_file

    from .model_folder import check_weights

    save_file(dict(_hf_tensors(model)), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model.config)
    special = {key: model.config[key] for key in _SPECIAL_IDS.values() if model.config.get(key) is not None}
    write_json(folder / "generation_config.json", special)
    save_tokenizer(_tokenizer(model), folder)
    check_weights(folder, DecoderConfig.from_hf(model.config))
    for path in folder.iterdir():
        path.chmod(0o644)


def _refuse(model: GgufModel) -> None:
    name, fields = model.path.name, model.fields
    family = fields.get("general.architecture")
    if family not in _FAMILIES:
        raise UnsupportedModelError(
            f"{name}: GGUF architecture {family!r} is not supported",
            hint=f"supported: {', '.join(_FAMILIES)}",
        )
    if fields.get(f"{family}.expert_count"):
        raise UnsupportedModelError(f"{name}: mixtures of experts are not handled")
    scaling = fields.get(f"{family}.rope.scaling.type")
    if "rope_freqs.weight" in model.tensors or scaling not in (None, "none"):
        raise UnsupportedModelError(
            f"{name}: its scaled rotary embedding is not read from a GGUF",
            hint="use the model's hub id or folder",
        )
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and pre not in _PRE_TOKENIZERS):
        raise UnsupportedModelError(
            f"{name}: its tokenizer ({kind}, {pre}) is not read from a GGUF",
            hint="use the model's hub id or folder",
        )
    for tensor in model.tensors:
        _hf_name(tensor, family, name)


def _hf_name(tensor: str, family: str, file: str) -> str:
    stem, _, suffix = tensor.rpartition(".")
    if stem in _TOP and suffix == "weight":
        return f"{_TOP[stem]}.weight"
    match = _BLOCK_NAME.match(tensor)
    table = {**_BLOCK, **_GEMMA_BLOCK} if family == "gemma3" else _BLOCK
    if match is None or match[2] not in table:
        raise UnsupportedModelError(f"{file}: the tensor {tensor} has no place in a {family}")
    return f"model.layers.{match[1]}.{table[match[2]]}.{match[3]}"


def _doubled_head(model: GgufModel) -> str | None:
    """Return which of embedding and head to keep if they are one matrix rounded twice, else None."""
    from gguf import GGML_QUANT_SIZES, dequantize

    names = ("token_embd.weight", "output.weight")
    if any(name not in model.tensors for name in names):
        return None
    embedding, head = (model.tensors[name] for name in names)
    if list(embedding.shape) != list(head.shape):
        return None
    a, b = (dequantize(t.data[:4096], t.tensor_type) for t in (embedding, head))
    if not np.linalg.norm(a - b) < _SAME_MATRIX * np.linalg.norm(b):
        return None
    bits = {t.name: GGML_QUANT_SIZES[t.tensor_type] for t in (embedding, head)}
    return max(names, key=lambda name: bits[name][1] / bits[name][0])


_SPECIAL_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def _config(model: GgufModel, *, tied: bool) -> dict[str, Any]:
    family = str(model.fields["general.architecture"])

    def number(key: str, default: Any = None) -> Any:
        value = model.fields.get(f"{family}.{key}", default)
        if value is None:
            raise FormatError(f"{model.path.name}: the header holds no {family}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModelError(f"{model.path.name}: {family}.{key} is not one number")
        return value

    if "token_embd.weight" not in model.tensors:
        raise FormatError(f"{model.path.name}: the tensor token_embd.weight is missing")
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    kind = _FAMILIES[family]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "vocab_size": int(model.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": int(
            number(
                "attention.key_length", model.fields.get(f"{family}.rope.dimension_count", hidden // heads)
            )
        ),
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(number("rope.freq_base", 1e6 if family == "gemma3" else 10_000.0)),
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "use_cache": True,
    }
    if kind == "gemma3_text":
        # llama.cpp: the 27B (62 layers) scales scores by hidden / heads, the others by the size of a head
        scalar = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "sliding_window": int(number("attention.sliding_window")),
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10_000.0,
            "attention_bias": False,
        }
    else:
        config["hidden_act"] = "silu"
        if kind != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
    for key, name in _SPECIAL_IDS.items():
        config[name] = model.fields.get(key)
    return config


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32 (9.99999974e-06 was written as 1e-05)."""
    return float(str(np.float32(value)))


def _hf_tensors(model: GgufModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from gguf import dequantize

    family = str(model.fields["general.architecture"])
    for name, tensor in model.tensors.items():
        if model.head is not None and name in ("token_embd.weight", "output.weight") and name != model.head:
            continue
        try:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{model.path.name}: {name} is {tensor.tensor_type.name}, which cannot be dequantized"
            ) from None
        if not math.isfinite(float(weight.sum(dtype=np.float64))):
            raise FormatError(f"{model.path.name}: {name} holds a value that is not finite")
        if family == "llama" and ".attn_q." in name:
            weight = _rotary_halves(weight, int(model.config["num_attention_heads"]))
        elif family == "llama" and ".attn_k." in name:
            weight = _rotary_halves(weight, int(model.config["num_key_value_heads"]))
        elif family == "gemma3" and name.endswith("norm.weight"):
            weight = weight - 1.0  # llama.cpp stores the factor, Hugging Face what is added to 1
        target = (
            "model.embed_tokens.weight" if name == model.head else _hf_name(name, family, model.path.name)
        )
        yield target, np.ascontiguousarray(weight, dtype=np.float32)


def _rotary_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's interleaving of rotary pairs: (heads, d/2, 2, …) -> (heads, 2, d/2, …)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(model: GgufModel) -> PreTrainedTokenizerFast:
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        read = AutoTokenizer.from_pretrained(
            str(model.path.parent), gguf_file=model.path.name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise FlrcError(f"{model.path.name}: its tokenizer cannot be read ({error})") from None
    backend, pre = read.backend_tokenizer, model.fields.get("tokenizer.ggml.pre")
    if model.fields.get("tokenizer.ggml.model") == "gpt2" and pre == "smollm":
        # both llama.cpp and the original split single digits first, which transformers' reader drops
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre == "qwen2":
        backend.normalizer = normalizers.NFC()  # as in the original's tokenizer.json
    special = {}
    for key, name in {**_SPECIAL_IDS, "tokenizer.ggml.unknown_token_id": "unk_token_id"}.items():
        token = None if model.fields.get(key) is None else backend.id_to_token(int(model.fields[key]))
        if token is not None:
            special[name.removesuffix("_id")] = token
    tokenizer: PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = model.fields.get("tokenizer.chat_template")
    return tokenizer
