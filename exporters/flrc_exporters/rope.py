"""Rotary position embeddings: frequencies, and how ``config.json`` spells them.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from flrc_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer; ``original_context`` is in tokens."""

    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0

    def inverse_frequencies(self, head_dim: int) -> tuple[float, ...]:
        """Return the ``head_dim / 2`` angular frequencies in radians per token.

        The llama3 form keeps short wavelengths, divides long ones by ``factor`` and blends
        between (Llama 3.1).
        """
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.scaling == "linear":
            return tuple(f / self.factor for f in plain)
        if self.scaling == "llama3":
            return tuple(self._llama3(f) for f in plain)
        return tuple(plain)

    def _llama3(self, frequency: float) -> float:
        turns = self.original_context * frequency / (2 * math.pi)  # over the original context
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


def read_rope(config: Mapping[str, Any], kind: str | None, context: int, *, default: float) -> Rope:
    """Read the rotary embedding of one kind of layer, in the spelling of transformers 4 or 5.

    Args:
        config: The content of ``config.json``.
        kind: ``full_attention`` or ``sliding_attention``, or None for all layers.
        context: Positions the model was trained for, in tokens.
        default: Theta when the configuration does not say.

    Raises:
        UnsupportedModelError: The two spellings disagree, or the scaling is not handled.
    """
    parameters = rope_parameters(config, kind, default=default)
    theta = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        refuse("partial_rotary_factor is set: only rotary embeddings of the whole head are handled")
    name = parameters["rope_type"]
    if name == "default":
        return Rope(theta)
    if name == "linear":
        return Rope(theta, "linear", factor=_positive(parameters, "factor"))
    if name != "llama3":
        refuse(f"rope type {name!r} is not handled", hint="supported: default, linear, llama3")
    return Rope(
        theta,
        "llama3",
        factor=_positive(parameters, "factor"),
        low_freq_factor=_positive(parameters, "low_freq_factor"),
        high_freq_factor=_positive(parameters, "high_freq_factor"),
        original_context=int(parameters.get("original_max_position_embeddings") or context),
    )


def rope_parameters(config: Mapping[str, Any], kind: str | None, *, default: float) -> dict[str, Any]:
    """Merge all that a configuration says of one rotary embedding into the spelling of transformers 5.

    What is said may stand in ``rope_parameters``, in ``rope_scaling`` (theta, too, in some files) and beside them.

    Args:
        config: The content of ``config.json``.
        kind: ``full_attention`` or ``sliding_attention`` where these differ, or None for all layers.
        default: Theta when nothing says it.

    Returns:
        ``rope_type``, ``rope_theta`` (a float) and the numbers of the scaling.

    Raises:
        UnsupportedModelError: Two places disagree, or theta is no positive number.
    """
    local = kind == "sliding_attention"
    new = _object(config, "rope_parameters")
    if kind is not None:
        if new and not {"full_attention", "sliding_attention"} & new.keys():
            refuse(  # transformers takes no notice of it
                "rope_parameters must name full_attention and sliding_attention, which have one of their own each"
            )
        new = new.get(kind) or {}
    old = {} if local else _object(config, "rope_scaling")
    if new and old and _rope_type(new) != _rope_type(old):
        refuse(f"rope_scaling ({_rope_type(old)}) and rope_parameters ({_rope_type(new)}) disagree")
    rope_type = _rope_type(new or old)
    beside = {"rope_theta": config.get("rope_local_base_freq" if local else "rope_theta")}
    if rope_type != "default":
        beside["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, values in (("", beside), ("rope_scaling.", old), ("rope_parameters.", new)):
        for key, value in values.items():
            if key in ("type", "rope_type") or value is None:
                continue
            if merged.setdefault(key, value) != value:
                refuse(f"{places[key]}{key} {merged[key]} and {place}{key} {value} disagree")
            places.setdefault(key, place)
    theta = merged.get("rope_theta", default)
    if not is_number(theta) or theta <= 0:
        refuse(f"rope_theta ({theta}) must be positive")
    return {**merged, "rope_type": rope_type, "rope_theta": float(theta)}


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        refuse(f"{name} must be an object, found {value!r}")
    return value


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _positive(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling.get(name)
    if not is_number(value) or value is None or value <= 0:
        raise UnsupportedModelError(f"config.json: rope {name} must be a positive number, found {value!r}")
    return float(value)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def refuse(message: str, *, hint: str | None = None) -> NoReturn:
    """Raise for a model that is not handled; the message names the field."""
    raise UnsupportedModelError(f"config.json: {message}", hint=hint)
