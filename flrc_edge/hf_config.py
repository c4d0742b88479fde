"""``config.json`` as transformers reads it: its own defaults spelled out, both spellings of the rotary embedding.

transformers 4 reads ``rope_theta`` and ``rope_scaling`` and silently falls back to 10000 where only the
``rope_parameters`` of transformers 5 are given; a file that holds both means the same to either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flrc_exporters.architectures import model_kind, with_defaults
from flrc_exporters.rope import rope_parameters
from flrc_runtime.errors import FlrcError, UnsupportedModelError
from flrc_runtime.files import read_json

FULL, SLIDING = "full_attention", "sliding_attention"
_THETA, _LAYERED_THETA, _LOCAL_THETA = 10_000.0, 1_000_000.0, 10_000.0  # the defaults of both versions


def normalized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``config`` that transformers 4 and 5 read as the same model.

    Args:
        config: The content of ``config.json``, written by either.

    Raises:
        UnsupportedModelError: The two spellings disagree, or one cannot be said in the other.
    """
    result = with_defaults(config)
    if model_kind(config) == "gemma3_text":  # one rotary embedding a kind of layer
        new_full = rope_parameters(config, FULL, default=_LAYERED_THETA)
        new_local = rope_parameters(config, SLIDING, default=_LOCAL_THETA)
        if new_local["rope_type"] != "default":
            raise UnsupportedModelError(
                f"config.json: rope type {new_local['rope_type']!r} on sliding_attention is not handled"
            )
        result["rope_parameters"] = {FULL: new_full, SLIDING: new_local}
        result["rope_local_base_freq"] = new_local["rope_theta"]
        _spell_layer_types(result)
    else:
        new_full = rope_parameters(config, None, default=_THETA)
        result["rope_parameters"] = new_full
    result["rope_theta"] = new_full["rope_theta"]
    old = {key: value for key, value in new_full.items() if key != "rope_theta"}
    result["rope_scaling"] = None if old["rope_type"] == "default" else old
    return result


def read_config(folder: Path) -> dict[str, Any]:
    """Read and normalize ``config.json``, adding end-of-text ids that only ``generation_config.json`` has.

    Raises:
        FlrcError: There is no ``config.json`` or it is not an object.
        UnsupportedModelError: See :func:`normalized_config`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FlrcError(
            f"{folder} holds no config.json",
            hint="give the folder of a Hugging Face model, a hub id or a GGUF file",
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise FlrcError(f"{path} is not a JSON object")
    result = normalized_config(config)
    generation = folder / "generation_config.json"
    if generation.is_file():
        extra = read_json(generation)
        ids = _ids(result.get("eos_token_id"))
        ids += [
            i for i in _ids(extra.get("eos_token_id") if isinstance(extra, dict) else None) if i not in ids
        ]
        if len(ids) > 1:
            result["eos_token_id"] = ids
        elif ids:
            result["eos_token_id"] = ids[0]
    return result


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _spell_layer_types(config: dict[str, Any]) -> None:
    """Write ``layer_types`` (transformers >= 4.53) and, if it says the same, ``sliding_window_pattern``."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    config.pop("_sliding_window_pattern", None)
    pattern = config.pop("sliding_window_pattern", None)
    types = config.get("layer_types")
    if types is None:
        types = _pattern(pattern if isinstance(pattern, int) and pattern > 0 else 6, layers)
    config["layer_types"] = list(types)
    for period in range(1, layers + 2):
        if _pattern(period, layers) == config["layer_types"]:
            config["sliding_window_pattern"] = period
            return


def _pattern(period: int, layers: int) -> list[str]:
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]
