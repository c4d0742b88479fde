"""Text in, text out: ids of any prompt, the text that goes on with it, and what single tokens are called."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flrc_runtime import ContextOverflowError, UsageError, generate
from flrc_runtime.engine import Model
from flrc_runtime.text_stream import Detokenizer
from flrc_runtime.tokenizer import LONG, Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "stories260k"


def sentencepiece() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json")))


def byte_level() -> Tokenizer:
    """One token a byte, a few merges, a special token, and one that has the text of another."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġa": 256, "ðŁ": 257, "ĺĢ": 258, "Ġb": 259}
    merges = [("Ġ", "a"), ("ð", "Ł"), ("ĺ", "Ģ"), ("Ġ", "b")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["日本", "x y"])
    return Tokenizer(tokenizer)


KINDS = {"sentencepiece": sentencepiece(), "byte level": byte_level()}
TEXT = st.text(st.sampled_from("ab .😀é漢\n\t") | st.characters(codec="utf-8"), min_size=1, max_size=25)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(deadline=None)
@given(text=TEXT, data=st.data())
def test_prompt_and_continuation_put_together_are_the_text(kind: str, text: str, data: st.DataObject) -> None:
    """Wherever a text is cut, the rest goes on with it as transformers decodes the whole."""
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(1, len(ids)))
    prompt = tokenizer.decode_start(ids[:cut])
    stream = Detokenizer(tokenizer, ids[:cut])
    found = "".join([*(stream.push(i) for i in ids[cut:]), stream.flush()])
    if not prompt.endswith("\ufffd"):
        assert prompt + found == tokenizer.decode_start(ids)
    else:  # a prompt of ids may end amid a character, which then comes whole
        assert prompt.rstrip("\ufffd") + found == tokenizer.decode_start(ids) or "\ufffd" in text


@pytest.mark.parametrize("kind", list(KINDS))
@settings(deadline=None)
@given(text=TEXT)
def test_bytes_of_tokens_put_together_are_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, special_tokens=False)
    prefix = b" " if kind == "sentencepiece" else b""
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == prefix + text.encode()
    named = [tokenizer.token_text(i) for i in ids]
    assert all(name.startswith("bytes:\\x") or "\ufffd" not in name or "\ufffd" in text for name in named)


def test_what_tokens_are_called() -> None:
    byte, piece = KINDS["byte level"], KINDS["sentencepiece"]
    assert [byte.token_text(i) for i in byte.encode(" a<|end|>日本x yé")] == [
        " a", "<|end|>", "日本", "x y", "bytes:\\xc3", "bytes:\\xa9"
    ]  # fmt: skip
    assert [piece.token_text(i) for i in piece.encode("Once 日</s>")] == [
        "<s>", " Once", " ", "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "</s>"
    ]  # fmt: skip
    once = piece.encode("Once upon")[1:]
    assert [piece.decode([i]) for i in once] == [" Once", " upon"] and piece.decode(once) == "Once upon"
    assert piece.decode([1]) == piece.decode([]) == "" and piece.token_text(99_999) == ""


def test_the_first_space_of_a_continuation_is_there(model: Model) -> None:
    for prompt in ("Once", "Lily", "Once upon a time, there was a little"):
        ids = model.tokenizer.encode(prompt)
        for given_prompt in (prompt, ids):
            answer = generate(model, given_prompt, max_tokens=6, chat=False)
            whole = model.tokenizer.decode([*ids, *answer.token_ids])
            assert prompt + answer.text == whole


def test_state_of_training_cuts_no_prompt(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    text = "Once upon a time there was a little girl"
    assert Tokenizer.from_folder(tmp_path / "t").encode(text) == KINDS["sentencepiece"].encode(text)
    long = text * (LONG // len(text) + 1)
    assert Tokenizer.from_folder(tmp_path / "t").encode(long) == KINDS["sentencepiece"].encode(long)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_long_text_has_the_ids_it_has_in_parts(kind: str) -> None:
    """The call that lets other threads go on gives what the other one gives."""
    tokenizer: Any = KINDS[kind]
    text = "Once upon a time<|end|> 日本 é\n" * (LONG // 20)
    assert len(text) >= LONG
    assert tokenizer.encode(text) == tokenizer._tokenizer.encode(text).ids


def test_a_text_that_cannot_fit_is_refused_unread() -> None:
    tokenizer = KINDS["sentencepiece"]
    begun = time.monotonic()
    with pytest.raises(ContextOverflowError, match=r"the prompt has at least \d{6} tokens") as caught:
        tokenizer.encode("once upon " * 390_000, most=512)
    assert time.monotonic() - begun < 1  # reading it takes seconds
    assert caught.value.n_prompt <= len("once upon ") * 390_000
    assert len(tokenizer.encode("once " * 5000, most=4096)) > 4096  # what may fit is read


def test_texts_of_which_much_may_be_one_token_are_read() -> None:
    """Tokens that swallow spaces, or a vocabulary without bytes: no length says how many tokens there are."""
    swallowing = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    swallowing.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    assert len(Tokenizer(swallowing).encode("<|end|>" + " " * 100_000, most=9)) == 2
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)
    )
    assert Tokenizer(words).encode("日" * 100_000, most=9) == [1]


def test_other_threads_go_on_while_a_long_text_is_read() -> None:
    tokenizer, waits, done = KINDS["sentencepiece"], [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            begun = time.monotonic()
            time.sleep(0.001)
            waits.append(time.monotonic() - begun)

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.monotonic()
    tokenizer.encode("once upon " * 40_000)
    took = time.monotonic() - begun
    done.set()
    thread.join()
    assert len(waits) > 3 and max(waits) < max(0.2, 0.9 * took)


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(UsageError, match="not valid Unicode at character 2"):
        KINDS["sentencepiece"].encode("ab\ud800")
