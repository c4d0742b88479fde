"""Text to token ids and back, with the bundle's tokenizer.json and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, Message
from .errors import ContextOverflowError, FormatError, UsageError
from .files import read_json, resolve_inside

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
LONG = 16_384  # characters from which a text is tokenized without Python's lock
_SHRINKS = 3  # most bytes of a text that normalizing makes one of (NFC of Hangul)


class Tokenizer:
    """The tokenizer of a bundle.

    Args:
        tokenizer: Of the ``tokenizers`` library.
        template: The chat template, or None.
        named_templates: Names of templates, if there are some and none of them is the default.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate | None = None,
        *,
        named_templates: Sequence[str] = (),
    ) -> None:
        # A training script may have left these on; they would cut prompts short, or fill them up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.template = template
        self._named_templates = tuple(named_templates)
        byte_tokens = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self._bytes = {i: byte for i, byte in byte_tokens.items() if i is not None}
        self.byte_ids = frozenset(self._bytes)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._swallows = any(token.lstrip or token.rstrip for token in added.values())

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
        config = _read_config(folder)
        return cls(tokenizer, _template(folder, config), named_templates=_template_names(config))

    def encode(self, text: str, *, special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text.
            special_tokens: Whether to add what the model expects around it, such as a BOS token.
            most: Tokens that may come out; a text that is certainly longer is refused before it is read.

        Raises:
            ContextOverflowError: There are certainly more than ``most`` tokens.
            UsageError: The text holds half of a surrogate pair, which no encoding can write.
        """
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
        if len(text) < LONG:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
            return ids
        if most is not None and size > most * self._longest:
            raise ContextOverflowError(size // self._longest, most, at_least=True)
        # Only the call for batches lets other threads go on meanwhile.
        whole: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids
        return whole

    def encode_chat(self, messages: Sequence[Message], *, most: int | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins; ``most`` as in :meth:`encode`.

        Raises:
            UsageError: The bundle has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise UsageError(f"the bundle {self.why_no_chat}", hint="use --raw")
        # The template writes BOS itself where the model wants one; encoding must not add a second.
        return self.encode(self.template.render(messages), special_tokens=False, most=most)

    @property
    def why_no_chat(self) -> str:
        """What is said of a bundle without a chat template."""
        if self._named_templates:
            return f"has chat templates ({', '.join(self._named_templates)}), none of them called default"
        return "has no chat template"

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are skipped.

        One token alone is given as it stands amid a text: sentencepiece decoders take the space from what comes first.
        """
        if len(ids) == 1 and ids[0] not in self.special_ids:
            return self.token_bytes(ids[0]).decode("utf-8", "replace")
        return self.decode_start(ids)

    def decode_start(self, ids: Sequence[int]) -> str:
        """Return the text of token ids that a text begins with; special tokens are skipped."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Return what a token is called: its text, special ones' too, or ``bytes:`` and the bytes of a part of one."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; those of its name if it is special."""
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        name: str = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self.special_ids:
            return name.encode()
        if self._byte_level:
            alphabet = _byte_alphabet()
            known = all(character in alphabet for character in name)
            return bytes(alphabet[character] for character in name) if known else name.encode()
        before = self._tokenizer.decode([self._anchor])
        return str(self._tokenizer.decode([self._anchor, token_id]))[len(before) :].encode()

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._tokenizer.decoder
        return decoder is not None and decoder.decode(["\u0120"]) == " "

    @cached_property
    def _anchor(self) -> int:
        """A token with a text of its own, to decode another one behind it."""
        ids: list[int] = self._tokenizer.encode("a", add_special_tokens=False).ids
        return ids[-1] if ids else 0

    @cached_property
    def _longest(self) -> int:
        """Bytes of a text that one token stands for, at most."""
        names = self._tokenizer.get_vocab()
        # Nothing of a text is left out then, and no run of characters is one unknown token.
        whole = self._byte_level or len(self._bytes) == 256
        if self._swallows or not whole:
            return 1 << 62
        return _SHRINKS * max(len(name.encode()) for name in names)


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level tokenizers (GPT-2's) write bytes as, and the bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def read_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a bundle, or None.

    Raises:
        FormatError: tokenizer_config.json is missing or damaged, or the template is not one.
    """
    return _template(folder, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(resolve_inside(folder, "tokenizer_config.json"))
    if not isinstance(config, dict):
        raise FormatError(f"{folder.name}/tokenizer_config.json is not an object")
    return config


def _template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
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


def _template_names(config: dict[str, Any]) -> tuple[str, ...]:
    source = config.get("chat_template")
    listed = source if isinstance(source, list) else []
    names = tuple(str(t.get("name")) for t in listed if isinstance(t, dict))
    return () if "default" in names else names


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that have a name: bos_token and its like, and those of a model's own."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
