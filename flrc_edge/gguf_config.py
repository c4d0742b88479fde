"""The ``config.json`` that the metadata of a GGUF file means, as llama.cpp reads it.

A key of the architecture that is not known here and is not neutral is refused by name, so that nothing that
changes what is computed is left out silently.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flrc_exporters.rope import Rope
from flrc_runtime.errors import FormatError, UnsupportedModelError

from .gguf_header import GgufHeader
from .gguf_tensors import EMBEDDING, ROPE, dequantized
from .hf_config import FULL, SLIDING, normalized_config

# general.architecture -> model_type; llama.cpp calls Mistral's files "llama" too.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Read below, or without effect on these families (what llama.cpp only stores, or needs for yarn alone).
_KNOWN = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.sliding_window",
    "attention.scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
_KNOWN_GEMMA = {"attention.sliding_window_pattern", "rope.freq_base_swa"}
# The value at which a key changes nothing; of all others, 0 and the empty list.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.output_scale": 1,
    "embedding_scale": 1,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "expert_weights_scale": 1,
}
_NEVER_NEUTRAL = {"attention.causal": False}
_WHY = {
    "expert_count": "mixtures of experts are not handled",
    "pooling_type": "it is a model of embeddings, not of text",
    "attention.causal": "only causal attention is handled",
    "final_logit_softcapping": "soft-capped logits are not handled",
    "attn_logit_softcapping": "soft-capped attention scores are not handled",
}
_HINT = "use the model's hub id or folder"


def config_of(header: GgufHeader, special: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the configuration of a file's model, in both spellings.

    Args:
        header: Of the file; its architecture is one of :data:`FAMILIES`.
        special: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        tied: Whether the head reads the embedding.

    Raises:
        FormatError: A number is missing.
        UnsupportedModelError: A key asks for what is not handled.
    """
    keys = _Keys(header)
    keys.refuse_unknown()
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if not 0 < heads <= hidden:
        raise FormatError(f"{keys.file}: {heads} heads in {hidden} dimensions")
    layers = keys.integer("block_count")
    if layers > len(header.tensors):
        raise FormatError(f"{keys.file}: {layers} layers of {len(header.tensors)} tensors")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            keys.refuse(key, f"the size of a head is {head_dim}")
    kind = FAMILIES[keys.family]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(keys.number("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "use_cache": True,
        **special,
    }
    scaling = _rope_scaling(keys, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if kind == "gemma3_text":
        config |= _gemma(keys, config)
    else:
        window = keys.integer("attention.sliding_window", 0)
        if 0 < window < config["max_position_embeddings"]:
            keys.refuse("attention.sliding_window", "llama.cpp reads none for this family, its model has one")
        config["hidden_act"] = "silu"
        if kind != "qwen2":
            config["attention_bias"] = any(
                name.startswith("blk.") and ".attn_" in name and name.endswith(".bias")
                for name in header.tensors
            )
    # llama.cpp, gemma: the 27B (62 layers) scales scores by hidden / heads, all others by the size of a head
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, config.get("query_pre_attn_scalar", head_dim) ** -0.5, rel_tol=1e-5):
        keys.refuse("attention.scale", "only 1 / sqrt(size of a head) is handled")
    return normalized_config(config)


class _Keys:
    """The metadata of one architecture, by the part of the name behind it."""

    def __init__(self, header: GgufHeader) -> None:
        self.header, self.file = header, header.path.name
        self.family = str(header.fields["general.architecture"])

    def get(self, key: str) -> Any:
        return self.header.fields.get(f"{self.family}.{key}")

    def number(self, key: str, default: float | None = None) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.file}: the header holds no {self.family}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnsupportedModelError(f"{self.file}: {self.family}.{key} is not one number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise FormatError(f"{self.file}: {self.family}.{key} is {value}, not a whole number")
        return int(value)

    def refuse(self, key: str, why: str) -> None:
        raise UnsupportedModelError(
            f"{self.file}: {self.family}.{key} is {self.get(key)!r}: {why}", hint=_HINT
        )

    def refuse_unknown(self) -> None:
        known = _KNOWN | _KNOWN_GEMMA if self.family == "gemma3" else _KNOWN
        for name, value in self.header.fields.items():
            key = name.removeprefix(f"{self.family}.")
            if key == name or key in known or value == _NEUTRAL.get(key, 0):
                continue
            if value in (0, "", [], False) and key not in _NEVER_NEUTRAL:
                continue
            self.refuse(key, _WHY.get(key, "this is not read from a GGUF file"))


def _rope_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the scaling of the rotary embedding in the spelling of ``rope_scaling``, or None.

    llama.cpp takes a missing type for linear, either key for its factor, and 0 and 1 for no scaling.
    """
    kind = keys.get("rope.scaling.type")
    kind = "linear" if kind is None else kind
    if kind not in ("none", "linear"):
        keys.refuse("rope.scaling.type", "this scaling of the rotary embedding is not read from a GGUF")
    old = keys.number("rope.scale_linear", 0.0)
    factor = 1.0 if kind == "none" else float(keys.number("rope.scaling.factor", old)) or 1.0
    if factor < 0:
        keys.refuse("rope.scaling.factor", "it must be positive")
    factors = _llama3_factors(keys, config)
    if factors is not None and factor != 1:
        keys.refuse("rope.scaling.factor", f"{ROPE} scales the rotary embedding, too")
    return factors if factor == 1 else {"rope_type": "linear", "factor": shortest(factor)}


def _llama3_factors(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the llama3 scaling whose divisors of the frequencies a file holds as a tensor, or None."""
    tensor = keys.header.tensors.get(ROPE)
    if tensor is None:
        return None
    divisors: NDArray[np.float32] = dequantized(keys.header, tensor)
    head_dim = config["head_dim"]
    if keys.family == "llama" and divisors.shape == (head_dim // 2,):
        if np.all(divisors == 1):
            return None
        # Llama 3.1 and 3.2 differ in the factor, which the lowest frequencies show
        rope = Rope(config["rope_theta"], "llama3", shortest(divisors.max()), 1.0, 4.0, 8192)
        plain = np.array(Rope(rope.theta).inverse_frequencies(head_dim))
        if np.allclose(plain / np.array(rope.inverse_frequencies(head_dim)), divisors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_context,
            }
    raise UnsupportedModelError(
        f"{keys.file}: the factors of its rotary embedding ({ROPE}) are not those of Llama 3", hint=_HINT
    )


def _gemma(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers, context = config["num_hidden_layers"], config["max_position_embeddings"]
    keys.number("rope.freq_base")  # llama.cpp and Hugging Face differ in what they take when it is missing
    window = keys.integer("attention.sliding_window", 0)
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != layers:
            keys.refuse("attention.sliding_window_pattern", f"the model has {layers} layers")
        types = [SLIDING if sliding else FULL for sliding in pattern]
    else:
        period = keys.integer("attention.sliding_window_pattern", 6)
        # as llama.cpp: 0 makes every layer slide, n every layer but each n-th
        types = [SLIDING if period == 0 or (i + 1) % period else FULL for i in range(layers)]
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or context,
        "layer_types": types if window else [FULL] * layers,
        "rope_local_base_freq": shortest(keys.number("rope.freq_base_swa", 10_000.0)),
        "attention_bias": False,
    }


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32 (9.99999974e-06 was written as 1e-05)."""
    return float(str(np.float32(value)))
