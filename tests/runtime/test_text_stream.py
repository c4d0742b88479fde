"""Text as it comes is the text of the whole, and no stop string shows in part."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flrc_runtime.text_stream import Detokenizer, StopStrings
from flrc_runtime.tokenizer import Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
FALLBACK = Tokenizer.from_folder(STORIES)  # sentencepiece-like, byte fallback


def byte_level() -> Tokenizer:
    """One token a byte, as GPT-2 writes bytes, a few merges and a special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġa": 256, "ðŁ": 257, "ĺĢ": 258}
    merges = [("Ġ", "a"), ("ð", "Ł"), ("ĺ", "Ģ")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return Tokenizer(tokenizer)


BYTE_LEVEL = byte_level()
TEXTS = st.text(st.sampled_from("ab .😀👩‍👩‍👧é漢�\n") | st.characters(codec="utf-8"), max_size=30)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("tokenizer", [FALLBACK, BYTE_LEVEL], ids=["byte fallback", "byte level"])
@given(text=TEXTS)
def test_texts(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    out = pieces(tokenizer, ids)
    assert "".join(out) == tokenizer.decode_start(ids)
    if "�" not in text:
        assert not any("�" in piece for piece in out)


@pytest.mark.parametrize(
    ("tokenizer", "size"), [(FALLBACK, 512), (BYTE_LEVEL, 260)], ids=["fallback", "level"]
)
@given(data=st.data())
def test_any_ids(tokenizer: Tokenizer, size: int, data: st.DataObject) -> None:
    """Broken characters, special tokens and leading spaces in any order."""
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.integers(0, 10), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode_start(ids)


def test_split_emoji_comes_whole() -> None:
    ids = BYTE_LEVEL.encode("a😀b")
    assert len(ids) == 4  # a, two halves of the emoji, b
    assert pieces(BYTE_LEVEL, ids) == ["a", "", "😀", "b", ""]
    assert pieces(BYTE_LEVEL, ids[:2]) == ["a", "", "�"]  # cut off in the middle
    fallback = pieces(FALLBACK, FALLBACK.encode("a😀b"))
    assert [p for p in fallback if p] == ["a", "😀b"]


def test_special_tokens_are_skipped() -> None:
    ids = [*BYTE_LEVEL.encode("a"), *BYTE_LEVEL.encode("<|end|>"), *BYTE_LEVEL.encode(" b")]
    assert "".join(pieces(BYTE_LEVEL, ids)) == "a b"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is cut into pieces, everything before the stop that is complete first comes out."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream = StopStrings(stops)
    out = ""
    for part in parts:
        out += stream.push(part)
        assert text.startswith(out) and not any(s in out for s in stops)
    out += stream.flush()
    found = [s for s in stops if s in text]
    assert stream.stopped() == bool(found)
    if not found:
        assert out == text
    else:
        assert any(text[len(out) :].startswith(s) for s in found)
