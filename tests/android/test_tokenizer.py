"""The Java tokenizer against the tokenizers library on the same tokenizer.json: real text and hostile strings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

DATA = Path(__file__).parents[2] / "flrc_edge" / "data"
STORIES = Path(__file__).parents[1] / "data" / "stories260k" / "tokenizer.json"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HOSTILE = [
    "", " ", "  ", "\n", " \n \n", "a" * 500, "\0\1", "é", "e\u0301", "ﬁ ﬀ", "½ ² ٣ ४ Ⅷ", "👩‍👩‍👧‍👦🏳️‍🌈", "\u202e abc",
    "<|im_start|>user<|im_end|>", "<|im_star", "<bos><eos>", "<s></s><unk>", "▁▁ ▁", "<0x0A>", "don't I'LL we'Ve 'S",
    "a\u00a0b\u3000c\u2003d", "\t\t x", "١٢٣456", "日本語テキスト。", "한국어", "اللغة", "ไทย", "😀" * 20, "x\r\ny",
    "\ufeffbom", "\u2028\u2029", "ǅ", "𝔘𝔫𝔦", "\u0345", "İı", "ſ's 'ſ 'K", "\x7f\x80\x9f", "\U0010ffff\ufffd\ufffe",
]  # fmt: skip
ALPHABET = "ab \n\t'sStTÉ日1²½👍\u0301\u00a0<>|_-.▁0xA"


def strings(rng: random.Random, count: int) -> list[str]:
    """Lines of the shipped texts, and as many random strings of characters that are treated in different ways."""
    lines = [
        line
        for name in ("wikitext2_calibration.txt", "austen_calibration.txt")
        for line in (DATA / name).read_text("utf-8").splitlines()
        if line.strip()
    ]
    mixed = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(count)]
    anything = [
        "".join(
            chr(c) for c in rng.choices(range(1, 0x2FFFF), k=rng.randint(1, 30)) if not 0xD800 <= c <= 0xDFFF
        )
        for _ in range(count // 2)
    ]
    return [*HOSTILE, *rng.sample(lines, min(count, len(lines))), *mixed, *anything]


def check(java: Callable[..., Any], path: Path, *, count: int = 900) -> int:
    """Compare ids with and without special tokens, and the text of random ids; return the number of strings."""
    rng = random.Random(0)
    library = tokenizers.Tokenizer.from_file(str(path))
    texts = strings(rng, count)
    ids = [rng.choices(range(library.get_vocab_size()), k=rng.randint(0, 30)) for _ in range(count)]
    done = java("TokenizerCheck", path, stdin="".join(json.dumps(asked) + "\n" for asked in [*texts, *ids]))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for text, answer in zip(texts, answers[: len(texts)], strict=True):
        assert answer["ids"] == library.encode(text, add_special_tokens=False).ids, repr(text)
        assert answer["special"] == library.encode(text).ids, repr(text)
    for one, answer in zip(ids, answers[len(texts) :], strict=True):
        assert answer["text"] == library.decode(one), one
    return len(texts)


def trained(kind: str, path: Path) -> Path:
    """Train a small tokenizer with the parts of SmolLM2's or Qwen2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    first = pre_tokenizers.Digits(individual_digits=True)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(DATA / "wikitext2_calibration.txt")], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["stories260k", "smollm2", "qwen2"])
def test_ids_and_text_are_those_of_the_library(java: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    path = STORIES if kind == "stories260k" else trained(kind, tmp_path / "tokenizer.json")
    assert check(java, path) >= 2000


@pytest.mark.full
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b"])
def test_real_models(java: Callable[..., Any], real_cache: Path, name: str) -> None:
    path = real_cache / "models" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"{name} is not on this machine (flrc-edge pull {name})")
    assert check(java, path, count=2000) >= 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "of type Unigram is not handled"),
        ({"pre_tokenizer": {"type": "Bert"}}, "pre_tokenizer of type Bert"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer of type Lowercase"),
        ({"decoder": {"type": "WordPiece"}}, "decoder of type WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "the merge of a and b"),
        ({"model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}}, "out of range"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}}, "model.dropout is set"),
        ({"added_tokens": [{"id": 0, "content": "x", "lstrip": True}]}, "lstrip of the token x"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "expected a whole number"),
        ({"model": None}, "expected {"),
    ],
)
def test_what_it_does_not_know_is_refused(
    java: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(STORIES.read_text("utf-8")) | change), "utf-8")
    done = java("TokenizerCheck", path)
    assert (done.returncode, message in done.stderr) == (3, True), done.stderr
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"model":', '{"a": 1,}', '{"a": 01}', '{"a": NaN}', '{"a": "\x01"}', '{"a": "\\x"}', "{} {}",
     '{"a": ' + "[" * 100 + "]" * 100 + "}", '{"a": 1e999}', '{"a": "\\ud8"}', '{"a" 1}', '{"a": tru}'],
)  # fmt: skip
def test_damaged_json_is_one_sentence(java: Callable[..., Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    done = java("TokenizerCheck", tmp_path / "tokenizer.json")
    assert done.returncode == 3 and done.stderr.startswith("Error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
