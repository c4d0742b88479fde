"""The KV cache of a transformers model, which 5.24 calls ``cache`` and versions before ``past_key_values``."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache (or None, for a new one) to a model."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output holds."""
    found = getattr(output, "cache", None)
    return output.past_key_values if found is None else found
