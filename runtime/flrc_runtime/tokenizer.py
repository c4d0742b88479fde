"""Text to token ids and back, with the bundle's tokenizer.json and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, Message
from .errors import FormatError, UsageError
from .files import read_json, resolve_inside

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a bundle.

    Args:
        tokenizer: Of the ``tokenizers`` library.
        template: The chat template, or None.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self.template = template
        byte_tokens = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(i for i in byte_tokens if i is not None)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Open tokenizer.json, tokenizer_config.json and chat_template.jinja (if there) of a bundle.

        Raises:
            FormatError: A file is missing or damaged.
        """
        import tokenizers

        path = resolve_inside(folder, "tokenizer.json")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise FormatError(f"{folder.name}/tokenizer.json is larger than {MAX_TOKENIZER_BYTES} bytes")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise FormatError(f"{folder.name}/tokenizer.json cannot be read: {error}") from None
        return cls(tokenizer, read_template(folder))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text.
            special_tokens: Whether to add what the model expects around it, such as a BOS token.

        Raises:
            UsageError: The text holds half of a surrogate pair, which no encoding can write.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins.

        Raises:
            UsageError: The bundle has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise UsageError("the bundle has no chat template", hint="use --raw")
        # The template writes BOS itself where the model wants one; encoding must not add a second.
        return self.encode(self.template.render(messages), special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are skipped."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def read_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a bundle, or None.

    Raises:
        FormatError: tokenizer_config.json is missing or damaged, or the template is not one.
    """
    config = read_json(resolve_inside(folder, "tokenizer_config.json"))
    if not isinstance(config, dict):
        raise FormatError(f"{folder.name}/tokenizer_config.json is not an object")
    source = _template_source(folder, config)
    return ChatTemplate(source, _special_tokens(config)) if source is not None else None


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        path = resolve_inside(folder, "chat_template.jinja")
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise FormatError(f"{folder.name}: the chat template is longer than {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{folder.name}/chat_template.jinja is not UTF-8") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens
