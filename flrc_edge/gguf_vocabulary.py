"""The vocabulary of a GGUF file as llama.cpp reads it: kinds of tokens, what is added to a text, what ends one.

Tokenizers that could not be rebuilt exactly are refused by name; gguf_tokenizer.py rebuilds the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flrc_runtime.errors import FormatError, UnsupportedModelError

from .gguf_header import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Byte-level vocabularies name their pre-tokenizer; one not listed would split text differently: refused.
PRE_TOKENIZERS = {
    "smollm": "smollm",
    "gpt-2": "gpt-2",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
}
# Tokens that end an answer in llama.cpp by their text alone, whatever the metadata says.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]"),
        *("[EOS]", "<eos>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
        "<｜end▁of▁sentence｜>",
        # where code is filled in: padding, the name of a repository, what parts files
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>"),
        *("<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
_END_KEYS = ("eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
_HINT = "use the model's hub id or folder"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, and how texts are made of them.

    Attributes:
        kind: ``llama`` (sentencepiece: merges by score) or ``gpt2`` (bytes: merges by rank).
        pre: How a ``gpt2`` kind splits a text first, one of the values of :data:`PRE_TOKENIZERS`.
        tokens: Their texts.
        types: Of each token: normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6.
        scores: Of each token, for the ``llama`` kind.
        merges: Pairs in order, for the ``gpt2`` kind.
        space_prefix: Whether every stretch of text between special tokens begins with a space.
        add_bos: Whether a text begins with BOS.
        add_eos: Whether a text ends with EOS.
        bos: Its id, or None.
        unknown: Its id, or None.
        padding: Its id, or None.
        ends: Ids that end an answer, the tokenizer's EOS first.
        template: The chat template, or None.
    """

    kind: Literal["llama", "gpt2"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    space_prefix: bool
    add_bos: bool
    add_eos: bool
    bos: int | None
    unknown: int | None
    padding: int | None
    ends: list[int]
    template: str | None

    def special_ids(self) -> dict[str, Any]:
        """Return what ``config.json`` says of special tokens."""
        eos = self.ends if len(self.ends) > 1 else next(iter(self.ends), None)
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.padding}


def read_vocabulary(header: GgufHeader) -> Vocabulary:
    """Read the vocabulary of a file.

    Raises:
        FormatError: There is none, or its parts do not fit together.
        UnsupportedModelError: It is of a kind that cannot be rebuilt exactly.
    """
    fields, file = _Fields(header), header.path.name
    kind, pre = str(fields.get("model")), str(fields.get("pre"))
    tokens = fields.array("tokens", str)
    if not tokens:
        raise FormatError(f"{file}: the file holds no vocabulary", hint=_HINT)
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and pre not in PRE_TOKENIZERS):
        raise UnsupportedModelError(
            f"{file}: its tokenizer ({kind}, {pre}) is not read from a GGUF",
            hint=_HINT,
        )
    for key in ("remove_extra_whitespaces", "suppress_tokens"):
        if fields.get(key):
            raise UnsupportedModelError(f"{file}: tokenizer.ggml.{key} is not read from a GGUF", hint=_HINT)
    spm = kind == "llama"
    pre = "" if spm else PRE_TOKENIZERS[pre]
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise FormatError(f"{file}: the vocabulary holds the token {twice!r} twice")
    if any("\udc80" <= char <= "\udcff" for token in tokens for char in token):
        raise FormatError(f"{file}: a token of the vocabulary is not UTF-8")
    types = fields.per_token("token_type", len(tokens)) or [NORMAL] * len(tokens)
    scores = fields.per_token("scores", len(tokens)) if spm else []
    if spm and len(set(scores)) < 2:
        raise UnsupportedModelError(f"{file}: its sentencepiece tokens have no scores", hint=_HINT)
    merges = [] if spm else _merges(file, fields.array("merges", str))
    bos, eos = fields.id("bos_token_id", tokens), fields.id("eos_token_id", tokens)
    ends = [i for i in [eos, *fields.ids("eos_token_ids", tokens)] if i is not None]
    if spm:  # llama.cpp's defaults
        bos = _within(1, tokens) if bos is None else bos
        ends = ends or [i for i in [_within(2, tokens)] if i is not None]
    types = [int(t) for t in types]
    ends += [i for key in _END_KEYS if (i := fields.id(key, tokens)) is not None]
    ends += sorted(ids[token] for token in _ENDS if token in ids)
    # HTML's </s> is a word of the vocabularies of Gemma and Qwen, at which llama.cpp would stop
    ends += [i for i in [ids.get("</s>")] if i is not None and types[i] == CONTROL]
    ends = list(dict.fromkeys(ends))
    for i in ends:
        if tokens[i] in _ENDS:
            types[i] = CONTROL  # whatever an old converter wrote
    unknown = fields.id("unknown_token_id", tokens)
    add_bos = fields.flag("add_bos_token", default=spm or pre == "llama3")
    add_eos = fields.flag("add_eos_token", default=False)
    if (add_bos and bos is None) or (add_eos and not ends):
        name = "bos" if add_bos and bos is None else "eos"
        raise FormatError(f"{file}: add_{name}_token is set, {name}_token_id is not")
    return Vocabulary(
        kind="llama" if spm else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        space_prefix=spm and fields.flag("add_space_prefix", default=True),
        add_bos=add_bos,
        add_eos=add_eos,
        bos=bos,
        unknown=_within(0, tokens) if spm and unknown is None else unknown,
        padding=fields.id("padding_token_id", tokens),
        ends=ends,
        template=_template(header.fields),
    )


class _Fields:
    """The metadata of the tokenizer."""

    def __init__(self, header: GgufHeader) -> None:
        self._fields, self._file = header.fields, header.path.name

    def get(self, key: str) -> Any:
        return self._fields.get(f"tokenizer.ggml.{key}")

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        value = self.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
            raise FormatError(f"{self._file}: tokenizer.ggml.{key} is not what it should be")
        return value

    def per_token(self, key: str, count: int) -> list[Any]:
        value = self.array(key, (int, float))
        if value and len(value) < count:
            raise FormatError(f"{self._file}: {len(value)} values of tokenizer.ggml.{key} for {count} tokens")
        return value[:count]

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def id(self, key: str, tokens: list[str]) -> int | None:
        """Return a token's id; as in llama.cpp, one out of range (some files say -1) is none."""
        return _within(self.get(key), tokens)

    def ids(self, key: str, tokens: list[str]) -> list[int | None]:
        value = self.get(key)
        return [_within(i, tokens) for i in (value if isinstance(value, list) else [value])]


def _within(value: Any, tokens: list[str]) -> int | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    return int(value) if number and 0 <= value < len(tokens) else None


def _merges(file: str, lines: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for line in lines:
        space = line.find(" ", 1)
        if space < 0:
            raise FormatError(f"{file}: the merge {line!r} is no pair")
        pairs.append((line[:space], line[space + 1 :]))
    if not pairs:
        raise FormatError(f"{file}: the file holds no tokenizer.ggml.merges", hint=_HINT)
    return pairs


def _template(fields: Mapping[str, Any]) -> str | None:
    # others have names (tool_use, …) and are used on request, which there is none for here
    for key in ("tokenizer.chat_template", "tokenizer.chat_template.default"):
        if isinstance(fields.get(key), str):
            return str(fields[key])
    return None
