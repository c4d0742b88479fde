"""Sentencepiece vocabularies of GGUF files: llama.cpp's token ids, by its own rule spelled out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flrc_edge.errors import FormatError, UnsupportedModelError
from flrc_edge.gguf_file import read_gguf
from flrc_edge.gguf_header import GgufHeader, read_header
from flrc_edge.gguf_tokenizer import tokenizer_of
from flrc_edge.gguf_vocabulary import Vocabulary, read_vocabulary

SPACE = "\u2581"
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "",
    " ",
    "  two  spaces   three    four     five      ",
    "\n\n\tTabs and\nlines",
    "naïve café 日本語 😀 \u2581 x",
    "Hi</s> ok",
    "</s></s>user",
    "<s>a<unk> b</s>",
    "aaaaaaaaaaaaaaa eeeee lll",
    "one<mark> two<mark><mark>three  <|sys|>\nfour<|sys|>",
]
EXTRA = {"<|sys|>": 3, "<mark>": 4, "  ": 4, "<|im_end|>": 3, "[PAD]5": 5}


def reference(v: Vocabulary, text: str, *, special: bool = True) -> list[int]:
    """Return llama.cpp's ids of a sentencepiece vocabulary, by its rule and without any cleverness.

    Control, unknown and user-defined tokens are cut out of the text first, longer ones before shorter ones. Each
    stretch left gets its prefix and is merged: of all neighbours that make a token those of the highest score,
    the leftmost first.
    """
    ids = {token: i for i, token in enumerate(v.tokens)}
    pieces: list[int | str] = [text] if text else []
    for token in sorted((t for t, kind in zip(v.tokens, v.types, strict=True) if kind in (2, 3, 4)), key=len)[
        ::-1
    ]:
        cut: list[int | str] = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            for i, part in enumerate(piece.split(token)):
                cut += [ids[token]] * (i > 0) + [part] * bool(part)
        pieces = cut
    found: list[int] = [v.bos] if special and v.add_bos and v.bos is not None else []
    for piece in pieces:
        if isinstance(piece, int):
            found.append(piece)
            continue
        symbols = list((" " * v.space_prefix + piece).replace(" ", SPACE))
        while True:
            pairs = [
                (-v.scores[ids[a + b]], i)
                for i, (a, b) in enumerate(itertools.pairwise(symbols))
                if a + b in ids
            ]
            if not pairs:
                break
            i = min(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found + (v.ends[:1] if special and v.add_eos else [])


@pytest.fixture
def vocabulary_of(
    stories: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> Callable[..., Vocabulary]:
    """Return a function that reads a vocabulary of stories260k with other fields and further tokens."""

    def make(added: dict[str, int] | None = None, /, **fields: tuple[str, Any]) -> Vocabulary:
        named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        return read_vocabulary(
            read_header(write_gguf(stories, tmp_path / "m.gguf", tokens=added, fields=named))
        )

    return make


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_space_prefix": ("bool", False)},
        {"add_bos_token": ("bool", False), "add_eos_token": ("bool", True)},
        {"add_space_prefix": ("bool", True), "add_eos_token": ("bool", True)},
    ],
)
@pytest.mark.parametrize("tokens", [{}, EXTRA])
def test_sentencepiece(
    fields: dict[str, Any], tokens: dict[str, int], vocabulary_of: Callable[..., Vocabulary]
) -> None:
    vocabulary = vocabulary_of(tokens, **fields)
    tokenizer = tokenizer_of(vocabulary, "m.gguf")
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference(vocabulary, text), text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference(vocabulary, text, special=False), text
        if not tokens and "<" not in text and SPACE not in text:
            assert tokenizer.decode(ids) == text


def test_the_folders_own_ids(
    stories: Path, vocabulary_of: Callable[..., Vocabulary], copied_model: Callable[..., Path]
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(stories)
    ours = tokenizer_of(vocabulary_of(), "m.gguf")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_kinds_of_tokens(vocabulary_of: Callable[..., Vocabulary]) -> None:
    """Control tokens are no part of an answer, user-defined ones are; an unused one is no token of a text."""
    tokenizer = tokenizer_of(vocabulary_of(EXTRA), "m.gguf")
    ids = tokenizer("x<mark>y<|sys|>z", add_special_tokens=False).input_ids
    assert {512, 513} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<mark> y z"
    assert 516 not in tokenizer("[PAD]5").input_ids
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert {i: token.special for i, token in added.items()} == {
        **dict.fromkeys((0, 1, 2, 512, 515), True),
        **dict.fromkeys((513, 514), False),
    }


def test_tokenizer_json_says_the_same(
    stories: Path, write_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """What is written is what was built, template included."""
    from flrc_edge.models import open_model

    fields = {
        "tokenizer.ggml.add_space_prefix": ("bool", False),
        "tokenizer.chat_template": ("string", "{{ bos_token }}{{ messages[0]['content'] }}"),
        "tokenizer.chat_template.tool_use": ("string", "no"),
    }
    path = write_gguf(stories, tmp_path / "m.gguf", fields=fields)
    built, read = tokenizer_of(read_gguf(path).vocabulary, ""), open_model(str(path)).tokenizer
    assert [read(text).input_ids for text in TEXTS] == [built(text).input_ids for text in TEXTS]
    message = [{"role": "user", "content": "Hi"}]
    assert read.apply_chat_template(message, tokenize=False) == "<s>Hi"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": ("string", "t5")}, UnsupportedModelError, r"its tokenizer \(t5, default\) is not read"),
        (
            {"model": ("string", "gpt2")},
            UnsupportedModelError,
            r"its tokenizer \(gpt2, default\) is not read",
        ),
        (
            {"model": ("string", "gpt2"), "pre": ("string", "tekken")},
            UnsupportedModelError,
            r"its tokenizer \(gpt2, tekken\) is not read",
        ),
        (
            {"model": ("string", "gpt2"), "pre": ("string", "qwen2")},
            FormatError,
            "holds no tokenizer.ggml.merges",
        ),
        ({"remove_extra_whitespaces": ("bool", True)}, UnsupportedModelError, "remove_extra_whitespaces"),
        ({"scores": ("array", [0.0] * 512)}, UnsupportedModelError, "sentencepiece tokens have no scores"),
        (
            {"scores": ("array", [0.5] * 100)},
            FormatError,
            "100 values of tokenizer.ggml.scores for 512 tokens",
        ),
        ({"token_type": ("array", [1] * 9)}, FormatError, "9 values of tokenizer.ggml.token_type for 512"),
        ({"tokens": ("array", ["a", "b", "a"])}, FormatError, "holds the token 'a' twice"),
        ({"tokens": ("array", [1, 2])}, FormatError, "tokenizer.ggml.tokens is not what it should be"),
    ],
)
def test_vocabularies_that_are_not_read(
    fields: dict[str, Any], error: type[Exception], message: str, vocabulary_of: Callable[..., Vocabulary]
) -> None:
    with pytest.raises(error, match=message):
        vocabulary_of(**fields)


def test_a_vocabulary_of_gemmas_size_takes_seconds(tmp_path: Path) -> None:
    """262,144 tokens: read and ranked, in far less than the minute that a wrong order of loops would take."""
    words = [
        "".join(w) for n in (1, 2, 3, 4) for w in itertools.product("abcdefghijklmnopqrstuvwx", repeat=n)
    ]
    words = ["<unk>", "<s>", "</s>", *words][: 1 << 18]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(words) - 3),
    }
    begin = time.process_time()
    tokenizer = tokenizer_of(read_vocabulary(GgufHeader(tmp_path / "m.gguf", fields, {})), "m.gguf")
    assert len(tokenizer) == 1 << 18
    assert time.process_time() - begin < 30
