"""The Java tokenizer against the tokenizers library on the same tokenizer.json: real text and hostile strings."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
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
BESIDE = ["  ", " the", *" \naB1_é\u0301\u200d\u00a0\x1c▁<>.日👍t"]  # what may be beside an added token
ALPHABET = "ab \n\t'sStTÉ日1²½👍\u0301\u00a0<>|_-.▁0xA"
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
LAYOUTS: dict[str, dict[str, Any]] = {  # of sentencepiece-like files
    "llama": {},
    "mistral": {"normalizer": None, "pre_tokenizer": METASPACE},
    "gemma": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    },
    "always": {
        "normalizer": {"type": "Strip", "strip_left": False, "strip_right": True},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
    },
    "never": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": METASPACE | {"prepend_scheme": "never", "split": True},
        "decoder": METASPACE | {"prepend_scheme": "never"},
    },
    "first": {  # what begins a text is told from where it was before all this
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": False},
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"String": "ab"}, "content": "x"},
                {"type": "Replace", "pattern": {"String": "t"}, "content": " the"},
                {"type": "Prepend", "prepend": "b"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\p{N}+|<"}, "behavior": "MergedWithNext", "invert": False},
                METASPACE | {"split": True},
            ],
        },
        "decoder": METASPACE,
    },
}  # fmt: skip
PATTERNS = {
    "llama-3": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\ud7ff]+", r"\s+$", r"\p{N}"],
}


def strings(rng: random.Random, count: int, contents: Sequence[str]) -> list[str]:
    """Lines of the shipped texts, random strings of characters that are treated in different ways, and added tokens
    between such characters."""
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
    tagged = [
        "".join(rng.choice([rng.choice(contents), rng.choice(BESIDE)]) for _ in range(rng.randint(1, 12)))
        for _ in range(count if contents else 0)
    ]
    return [*HOSTILE, *rng.sample(lines, min(count, len(lines))), *mixed, *anything, *tagged]


def check(java: Callable[..., Any], path: Path, *, count: int = 900) -> int:
    """Compare ids with and without special tokens, and the text of random ids; return the number of strings."""
    rng = random.Random(0)
    library = tokenizers.Tokenizer.from_file(str(path))
    texts = strings(rng, count, [t.content for _, t in sorted(library.get_added_tokens_decoder().items())])
    ids = [rng.choices(range(library.get_vocab_size() + 9), k=rng.randint(0, 30)) for _ in range(count)]
    done = java("TokenizerCheck", path, stdin="".join(json.dumps(asked) + "\n" for asked in [*texts, *ids]))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for text, answer in zip(texts, answers[: len(texts)], strict=True):
        assert answer["ids"] == library.encode(text, add_special_tokens=False).ids, repr(text)
        assert answer["special"] == library.encode(text).ids, repr(text)
    for one, answer in zip(ids, answers[len(texts) :], strict=True):
        assert answer["text"] == library.decode(one, skip_special_tokens=True), one
    return len(texts)


def added_tokens() -> list[dict[str, Any]]:
    """Return tokens with every combination of flags, as words and as signs, and odd ones; ids have gaps."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    kinds = [
        dict(zip(names, flags, strict=True)) for flags in itertools.product((False, True), repeat=len(names))
    ]
    contents = [(f"<{i}>", kind) for i, kind in enumerate(kinds)]
    contents += [(f"word{i}", kind) for i, kind in enumerate(kinds)]  # word1 begins word10
    plain = dict.fromkeys(names, False)
    odd = ["", "<", "<1", " <s", "  ", "\n\n", "▁", "▁word", "é", "👍", "of", "the", "s"]
    contents += [(content, plain) for content in odd]
    contents += [
        (c, plain | {"normalized": True}) for c in ("e\u0301e\u0301", "\u0344", "ab", "abt", " an", " at")
    ]
    contents += [(c, plain | {"normalized": True, "special": True}) for c in (" of", "½")]
    contents += [("twice", plain | {"special": True}), ("twice", plain | {"lstrip": True})]
    return [{"id": 3000 + 3 * i, "content": content} | kind for i, (content, kind) in enumerate(contents)]


def changed(path: Path, **change: Any) -> Path:
    """Change fields of a tokenizer.json."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    return path


def trained(kind: str, path: Path) -> Path:
    """Train a small tokenizer with the parts of SmolLM2's or Qwen2's, or with the patterns of others."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    first = [pre_tokenizers.Digits(individual_digits=True)]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        first = [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")]
    elif kind != "smollm2":
        first = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[kind]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
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


@pytest.mark.parametrize("kind", ["stories260k", "smollm2", "qwen2", *PATTERNS])
def test_ids_and_text_are_those_of_the_library(java: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    path = STORIES if kind == "stories260k" else trained(kind, tmp_path / "tokenizer.json")
    assert check(java, path) >= 2000


@pytest.mark.parametrize("kind", ["smollm2", "qwen2", *LAYOUTS])
def test_added_tokens_are_found_as_the_library_does(
    java: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if kind in LAYOUTS:
        path.write_bytes(STORIES.read_bytes())
        changed(path, **LAYOUTS[kind])
        assert check(java, path, count=700) >= 2000
    else:
        trained(kind, path)
    tokens = json.loads(path.read_text("utf-8"))["added_tokens"]
    assert check(java, changed(path, added_tokens=tokens + added_tokens()), count=700) >= 2000


@pytest.mark.parametrize("fuse", [False, True])
def test_unknown_characters_are_those_of_the_library(
    java: Callable[..., Any], tmp_path: Path, fuse: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(STORIES.read_bytes())
    model = json.loads(path.read_text("utf-8"))["model"] | {"fuse_unk": fuse}
    for byte in (
        "<0x01>",
        "<0xE6>",
        "<0xCC>",
    ):  # characters with them are unknown, others beside them are bytes
        del model["vocab"][byte]
    assert check(java, changed(path, model=model), count=300) >= 900


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(
    "behavior", ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"]
)
def test_splits_are_those_of_the_library(
    java: Callable[..., Any], tmp_path: Path, behavior: str, invert: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(STORIES.read_bytes())
    split = {"type": "Split", "pattern": {"Regex": "[aeh]|▁|\\s*"}, "behavior": behavior, "invert": invert}
    assert check(java, changed(path, pre_tokenizer=split), count=300) >= 900


@pytest.mark.parametrize("kind", ["stories260k", "smollm2"])
def test_tokens_that_other_files_name(java: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """What tokenizer_config.json or added_tokens.json says is in the one file that this engine reads."""
    from transformers import PreTrainedTokenizerFast

    from flrc_edge.tokenizer_files import open_tokenizer, save_tokenizer

    source, folder = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    folder.mkdir()
    if kind == "stories260k":
        (source / "tokenizer.json").write_text(STORIES.read_text("utf-8"), "utf-8")
    else:
        trained(kind, source / "tokenizer.json")
    size = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    token = {**flags, "content": "<|end|>", "rstrip": True, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {str(size): token}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    save_tokenizer(open_tokenizer(source), folder)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    more = tmp_path / "more"
    more.mkdir()
    save_tokenizer(open_tokenizer(source), more)
    for place, name in ((folder, "<|end|>"), (more, "<tool>")):
        assert check(java, place / "tokenizer.json") >= 2000
        asked = json.dumps(f"Once {name}  upon{name}")
        (answer,) = [
            json.loads(line)
            for line in java("TokenizerCheck", place / "tokenizer.json", stdin=asked).stdout.splitlines()
        ]
        wanted: Any = PreTrainedTokenizerFast.from_pretrained(place)(f"Once {name}  upon{name}")["input_ids"]
        assert answer["special"] == wanted and size in wanted


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
        ({"added_tokens": [{"id": 0, "content": "x", "lstrip": 1}]}, "lstrip: expected true or false"),
        (
            {
                "added_tokens": [
                    {"id": i, "content": c, "normalized": True} for i, c in enumerate(("e\u0301", "é"))
                ],
                "normalizer": {"type": "NFC"},
            },
            "the same once normalized",
        ),
        (
            {
                "added_tokens": [{"id": 0, "content": " ", "normalized": True}],
                "normalizer": {"type": "Strip"},
            },
            "is empty",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": ""}}, "normalizer of type Prepend"),
        ({"pre_tokenizer": METASPACE | {"prepend_scheme": "last"}}, "pre_tokenizer of type Metaspace"),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}},
            "of type Metaspace",
        ),
        (
            {"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
            "decoder of type Replace",
        ),
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
    ("pattern", "message"),
    [
        ("^a", "^ is not"), ("a.b", ". is not"), (r"\p{N}{1,3}+", "}+ is not"), (r"a{2}?", "}? is not"),
        ("(?m:a)", "(? is not"), ("a(?i)b", "(? is not"), (r"(a)\1", "\\1 is not"), (r"\h", "\\h is not"),
        (r"\w+", "\\w is not"),
        (r"\p{Han}", "\\p is not"), (r"(?i:(a)\p{Lu})", "\\p is not"), ("[[:alpha:]]", "[: is not"),
        (r"[\p{L}&&[^a]]", "&& is not"), ("(", "cannot be read"), ("a\\", "cannot be read"), ("[a", "cannot be read"),
    ],
)  # fmt: skip
def test_patterns_that_java_reads_in_another_way_are_refused(
    java: Callable[..., Any], tmp_path: Path, pattern: str, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(STORIES.read_bytes())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    done = java("TokenizerCheck", changed(path, pre_tokenizer=split))
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
