"""A conversation in a JSON file: the model's name and the messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flrc_edge.errors import FlrcError, UsageError


def check_new(path: Path) -> None:
    """Refuse a file that exists or has no folder; nothing that was saved is overwritten.

    Raises:
        UsageError: It is such a file.
    """
    if path.exists():
        raise UsageError(f"{path} exists already", hint="choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")


def write_messages(path: Path, messages: Sequence[dict[str, str]], *, model: str) -> None:
    """Write the messages whole or not at all.

    Args:
        path: A new file.
        messages: With role and content.
        model: Name of the model that answered.

    Raises:
        UsageError: The file exists, or its folder does not.
        FlrcError: It cannot be written.
    """
    from flrc_runtime.files import write_json

    check_new(path)
    try:
        write_json(path, {"model": model, "messages": list(messages)})
    except OSError as error:
        raise FlrcError(f"{path} cannot be written: {error.strerror or error}") from None


def read_messages(path: Path) -> list[dict[str, str]]:
    """Return the messages of a file that :func:`write_messages` wrote.

    Raises:
        FormatError: The file cannot be read.
        UsageError: It holds no conversation.
    """
    from flrc_runtime.conversation import check_turns
    from flrc_runtime.files import read_json

    content = read_json(path)
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UsageError(f"{path} holds no messages", hint="give a file that /save wrote")
    check_turns(messages)
    return messages
