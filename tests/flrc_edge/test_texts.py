"""Calibration text: parsing, shares, windows, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flrc_edge import texts
from flrc_edge.errors import UsageError
from flrc_edge.texts import WeightedText, leading_bos, read_text, token_windows

STORY = "One day, a little girl found a red ball in the park. She wanted to play with it. "


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(stories)


@pytest.fixture
def two_texts(tmp_path: Path) -> tuple[str, str]:
    for name, words in (("a", STORY), ("b", STORY.upper())):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{i}. {words}" for i in range(200)))
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("wikitext2", "wikitext2", 1.0),
        ("notes.txt:2", "notes.txt", 2.0),
        ("a/b:.25", "a/b", 0.25),
        ("C:/notes.txt", "C:/notes.txt", 1.0),
        ("C:/notes.txt:3", "C:/notes.txt", 3.0),
    ],
)
def test_parse(spec: str, name: str, weight: float) -> None:
    assert WeightedText.parse(spec) == WeightedText(name, weight)


@pytest.mark.parametrize("spec", ["a:0", "a:-1", "a:nan", "a:inf", "", ":2"])
def test_parse_refuses(spec: str) -> None:
    with pytest.raises(UsageError, match=r"positive number|names no text"):
        WeightedText.parse(spec)


@pytest.mark.parametrize(
    ("weights", "windows", "shares"),
    [((1, 1), 6, [3, 3]), ((3, 1), 8, [6, 2]), ((0.75, 0.25), 4, [3, 1]), ((1, 1000), 3, [0, 3])],
)
def test_weights_share_the_windows(
    tokenizer: Any, two_texts: tuple[str, str], weights: tuple[float, float], windows: int, shares: list[int]
) -> None:
    sources = tuple(WeightedText(name, w) for name, w in zip(two_texts, weights, strict=True))
    result = token_windows(tokenizer, sources, windows=windows, length=32, seed=0)
    assert result.ids.shape == (windows, 32) and result.ids.dtype == torch.int64
    assert [s.tokens for s in result.sources] == [32 * s for s in shares if s]
    assert sum(s.tokens for s in result.sources) == result.ids.numel()
    expected = [name for name, s in zip(("a.txt", "b.txt"), shares, strict=True) if s]
    assert [s.name for s in result.sources] == expected  # no machine path in the manifest


def test_windows_are_pieces_of_their_text(tokenizer: Any, two_texts: tuple[str, str]) -> None:
    text = WeightedText(two_texts[0])
    ids = tokenizer(read_text(two_texts[0]), add_special_tokens=False)["input_ids"]
    found = token_windows(tokenizer, (text,), windows=10, length=40, seed=3).ids
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    joined = ",".join(map(str, ids))
    starts = [joined.index(",".join(map(str, row[1:].tolist()))) for row in found]
    assert starts == sorted(starts) and starts[-1] > len(joined) * 0.8  # spread over the whole text


def test_without_a_seed_windows_follow_each_other(tokenizer: Any, two_texts: tuple[str, str]) -> None:
    ids = tokenizer(read_text(two_texts[0]), add_special_tokens=False)["input_ids"]
    every = token_windows(tokenizer, (WeightedText(two_texts[0]),), windows=None, length=32).ids
    assert len(every) == len(ids) // 31
    assert every[:, 1:].flatten().tolist() == ids[: 31 * len(every)]


def test_seed(tokenizer: Any, two_texts: tuple[str, str]) -> None:
    def windows(seed: int) -> torch.Tensor:
        sources = tuple(map(WeightedText, two_texts))
        return token_windows(tokenizer, sources, windows=6, length=32, seed=seed).ids

    assert torch.equal(windows(7), windows(7))
    assert not torch.equal(windows(7), windows(8))


def test_bos_only_where_the_tokenizer_adds_it(stories: Path, two_texts: tuple[str, str]) -> None:
    plain = PreTrainedTokenizerFast.from_pretrained(stories)
    assert leading_bos(plain) == [1]
    from tokenizers import processors

    plain._tokenizer.post_processor = processors.ByteLevel()
    assert leading_bos(plain) == []
    ids = token_windows(plain, (WeightedText(two_texts[0]),), windows=2, length=16).ids
    assert (ids != 1).all()


def test_jsonl_and_folder(tmp_path: Path) -> None:
    lines = ["first\nparagraph", "a line separator \u2028 and \x85 inside", "last"]
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in lines) + "\n\n", "utf-8"
    )
    whole = "".join(f"{t}\n\n" for t in lines)
    assert read_text(str(tmp_path / "x.jsonl")) == whole
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "z.md").write_text("from below")
    (tmp_path / "ignored.bin").write_bytes(b"\x00\xff")
    assert read_text(str(tmp_path)) == "from below\n\n" + whole


def test_messages_are_written_as_the_chat_template_says(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "plain"}))
    chatty = PreTrainedTokenizerFast.from_pretrained(stories)
    assert read_text(str(path), chatty) == "User: Hi\n\nAssistant: Hello\n\nplain\n\n"
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_text(str(path), chatty) == "<user>Hi<assistant>Helloplain\n\n"
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UsageError, match=r"line 1: the chat template refuses the messages: roles must alternate"
    ):
        read_text(str(path), chatty)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert read_text(str(tmp_path / "a.txt")) == "hello"
    assert read_text(str(tmp_path / "a.jsonl")) == "hello\n\n"


@pytest.mark.parametrize("name", sorted(texts.BUILT_IN))
def test_built_in_texts(name: str) -> None:
    assert len(read_text(name)) > 90_000


def test_calibration_and_heldout_texts_share_no_line() -> None:
    for name in ("wikitext2", "austen"):
        long = {line for line in read_text(name).splitlines() if len(line) > 60}
        assert not long & set(read_text(f"{name}-heldout").splitlines())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "the text {} is empty"),
        ("a.txt", b" \n\t ", "the text {} is empty"),
        ("a.txt", b"ab\x00c", "the text {} looks binary"),
        ("a.txt", b"\xff\xfeab", "the text {} is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "{}, line 3 is no JSON"),
        ("a.jsonl", b'{"content": "a"}', "{}, line 1 must be a JSON object with a field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "{}, line 2 must be a JSON object with a field 'text'"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "{}, line 1: the content of a message is no text"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', "{}, line 1: 'messages' must be a list of objects"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": 3}]}',
            "{}, line 1: the content of a message",
        ),
        ("a.jsonl", b'{"messages": "hi"}', "{}, line 1: 'messages' must be a list of objects"),
        ("a.jsonl", b"[1]", "{}, line 1 must be a JSON object with a field 'text'"),
        ("a.jsonl", b"3", "{}, line 1 must be a JSON object with a field 'text'"),
    ],
)
def test_wrong_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_text(str(path))
    assert str(caught.value).startswith(message.format(path)) and "\n" not in str(caught.value)


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no text 'nowhere.txt'") as caught:
        read_text("nowhere.txt")
    assert caught.value.hint and "wikitext2" in caught.value.hint
    with pytest.raises(UsageError, match=r"holds no text file"):
        read_text(str(tmp_path))


def test_too_short_says_what_is_there_and_what_is_needed(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time")
    have = len(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"])
    for windows, needed in ((3, 93), (None, 31)):
        with pytest.raises(UsageError, match=f"holds {have} tokens, {needed} are needed"):
            token_windows(tokenizer, (WeightedText(str(tmp_path / "a.txt")),), windows=windows, length=32)


@pytest.mark.parametrize("windows", [0, -1])
def test_no_windows(tokenizer: Any, windows: int) -> None:
    with pytest.raises(UsageError, match="number of windows"):
        token_windows(tokenizer, (WeightedText("austen"),), windows=windows, length=32)
    with pytest.raises(UsageError, match="at least one text"):
        token_windows(tokenizer, (), windows=1, length=32)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "WHOLE", 4096)
    monkeypatch.setattr(texts, "PIECE", 512)


@pytest.mark.usefixtures("small_limits")
def test_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{i:06d} é\n" for i in range(10_000)), "utf-8")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read whole"))
    monkeypatch.setattr(Path, "read_text", lambda self, *a: pytest.fail("read whole"))
    lines = read_text(str(path)).strip("\n").split("\n")
    assert len("\n".join(lines).encode()) <= 4096
    assert all(len(line) == 8 and line.endswith(" é") for line in lines)  # no torn line
    numbers = [int(line[:6]) for line in lines]
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] > 9_900


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("shift", range(3))
def test_a_large_file_without_lines(tmp_path: Path, shift: int) -> None:
    path = tmp_path / "large.txt"
    path.write_text("x" * shift + "日本語" * 2_000, "utf-8")
    text = read_text(str(path))
    assert set(text) <= set("日本語\nx") and len(text) > 1_000


@pytest.mark.usefixtures("small_limits")
def test_a_large_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} " + "a" * 50}) for i in range(500)))
    assert set(read_text(str(path)).replace("\n\n", " ").split()[1::2]) == {"a" * 50}
    path.write_text("\n".join(json.dumps({"text": "a" * 5000}) for i in range(5)))
    with pytest.raises(UsageError, match="no line shorter than the 512 bytes"):
        read_text(str(path))
    path.write_bytes(b"\xff" * 10_000)
    with pytest.raises(UsageError):
        read_text(str(path))
