"""Errors a user can cause: one sentence each, with what to do next.

The command line prints ``Error: <message>`` and, if given, ``Hint: <hint>``, and exits with ``exit_code``.
"""

from __future__ import annotations


class FlrcError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: One sentence naming the value or file at fault.
        hint: What to do next, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FlrcError):
    """An option or argument is out of range."""

    exit_code = 2


class VerificationError(FlrcError):
    """A folder does not hold what its ``flrc.json`` says."""

    exit_code = 3


class FormatError(VerificationError):
    """A file is not in the written format (truncated, unknown field, newer version)."""


class UnsupportedModelError(FlrcError):
    """The model is of a family or shape this project does not handle."""


class EmptyPromptError(UsageError):
    """The prompt holds no token."""


class ContextOverflowError(UsageError):
    """Prompt and answer do not fit the context.

    Args:
        n_prompt: Tokens of the prompt.
        n_context: Tokens the context holds.
        at_least: The prompt was not read to its end.
    """

    def __init__(self, n_prompt: int, n_context: int, *, at_least: bool = False) -> None:
        found = f"{'at least ' if at_least else ''}{n_prompt} tokens"
        super().__init__(
            f"the prompt has {found} and leaves no room for an answer in a context of {n_context}",
            hint="shorten the prompt or load the bundle with a larger context",
        )
        self.n_prompt = n_prompt
        self.n_context = n_context


class NumericalError(FlrcError):
    """A value that must be finite is not."""
