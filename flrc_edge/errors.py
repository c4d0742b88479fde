"""The errors of the whole project; they live beside the runtime, which must not depend on anything else."""

from flrc_runtime.errors import (
    ContextOverflowError,
    EmptyPromptError,
    FlrcError,
    FormatError,
    NumericalError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)

__all__ = [
    "ContextOverflowError",
    "EmptyPromptError",
    "FlrcError",
    "FormatError",
    "NumericalError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
]
