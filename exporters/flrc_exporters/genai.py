"""``genai_config.json``, so that every stage also loads in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .architectures import DecoderConfig

# onnxruntime-genai's names for the families.
_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3_text",
}


def eos_tokens(config: DecoderConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of config.json and of generation_config.json."""
    value = generation.get("eos_token_id")
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    both = dict.fromkeys([*config.eos_token_ids, *tokens])
    return tuple(t for t in both if isinstance(t, int) and 0 <= t < config.vocab_size)


def genai_config(
    config: DecoderConfig, generation: Mapping[str, Any], *, context: int, graph: str
) -> dict[str, Any]:
    """Return the configuration of one stage.

    Args:
        config: The architecture.
        generation: The content of generation_config.json, or nothing.
        context: Positions the graph can hold.
        graph: File name of the stage's graph; ``Config.overlay`` replaces it to load another.
    """
    eos = eos_tokens(config, generation) or (0,)
    pad = config.pad_token_id
    bos = config.bos_token_id
    return {
        "model": {
            "type": _TYPES[config.architecture],
            "bos_token_id": eos[0] if bos is None else bos,
            "eos_token_id": list(eos),
            "pad_token_id": eos[0] if pad is None or pad >= config.vocab_size else pad,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "flrc-edge", "provider_options": []},
                "filename": graph,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_hidden_layers": config.num_layers,
                "num_key_value_heads": config.num_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        },
    }
