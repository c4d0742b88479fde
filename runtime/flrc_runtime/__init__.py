"""Decode a bundle of nested low-rank ONNX graphs with onnxruntime; needs no torch.

>>> model = flrc_runtime.load("bundle")
>>> for token in model.stream("Once upon a time"):
...     print(token.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ContextOverflowError,
    EmptyPromptError,
    FlrcError,
    FormatError,
    NumericalError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from .adaptive_policy import Cheapest, LatencyBudget, MeanBudget, SignalStages
    from .bundle import load
    from .conversation import Conversation
    from .engine import Answer, Model, Token, generate, stream
    from .policy import FixedStage, Policy, SchedulePolicy, ScriptedStages, StepState
    from .sampling import Sampling
    from .speculative import Speculation

__all__ = [
    "Answer",
    "Cheapest",
    "ContextOverflowError",
    "Conversation",
    "EmptyPromptError",
    "FixedStage",
    "FlrcError",
    "FormatError",
    "LatencyBudget",
    "MeanBudget",
    "Model",
    "NumericalError",
    "Policy",
    "Sampling",
    "SchedulePolicy",
    "ScriptedStages",
    "SignalStages",
    "Speculation",
    "StepState",
    "Token",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "generate",
    "load",
    "stream",
]

# Imported at first use: numpy, onnxruntime and tokenizers would double the time of `flrc-edge --help`.
_HOMES = {
    "load": "bundle",
    "Conversation": "conversation",
    "Answer": "engine",
    "Model": "engine",
    "Token": "engine",
    "generate": "engine",
    "stream": "engine",
    "FixedStage": "policy",
    "Policy": "policy",
    "SchedulePolicy": "policy",
    "ScriptedStages": "policy",
    "StepState": "policy",
    "Cheapest": "adaptive_policy",
    "LatencyBudget": "adaptive_policy",
    "MeanBudget": "adaptive_policy",
    "SignalStages": "adaptive_policy",
    "Sampling": "sampling",
    "Speculation": "speculative",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
