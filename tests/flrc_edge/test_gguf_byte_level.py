"""Byte-level vocabularies of GGUF files: the ids of the original's tokenizer.json, for every pre-tokenizer read."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from flrc_edge.gguf_header import read_header
from flrc_edge.gguf_tokenizer import tokenizer_of
from flrc_edge.gguf_vocabulary import read_vocabulary

# Pre-tokenizers as tokenizer.json of GPT-2, SmolLM2, Qwen2.5 and Llama 3 spell them.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LATER = {**BYTES, "use_regex": False}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ORIGINALS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "qwen2": [split(QWEN), LATER],
    "llama-bpe": [split(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), LATER],
}
CORPUS = [
    "It's 1234567 times better; we'LL see!!\n\n\n  def f(x):\n        return x**2 # ok\r\n",
    "Über naïve café e\u0301 日本語テスト 😀😀 ١٢٣ ½ ³\t\ttabs   \n",
    "the thing that they think there then 3.14159 and 1000000 don't DON'T",
]


@pytest.mark.parametrize("pre", list(ORIGINALS))
def test_byte_level(pre: str, tmp_path: Path) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Tokenizer.from_str(_json(ORIGINALS[pre], {}, [], pre)).pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=_alphabet(), show_progress=False)
    trained.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    words += ["Ġbananas", "<|begin|>", "<|eot_id|>", "<think>"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    original = Tokenizer.from_str(_json(ORIGINALS[pre], {w: i for i, w in enumerate(words)}, merges, pre))
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 3) + [3, 3, 4])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(len(words) - 3)
    writer.add_eos_token_id(len(words) - 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = read_vocabulary(read_header(tmp_path / "v.gguf"))
    tokenizer = tokenizer_of(vocabulary, "v.gguf")
    begin = [len(words) - 3] if pre == "llama-bpe" else []  # the only one that llama.cpp begins so by itself
    for text in [*CORPUS, "", " bananas", "a<|eot_id|>\n\nb<think> c</think>", "\u212b \uac00"]:
        ids = tokenizer(text).input_ids
        assert ids == begin + original.encode(text).ids, text
        assert tokenizer.decode(ids[len(begin) :]) == (_composed(text) if pre == "qwen2" else text)
    whole = tokenizer(" bananas", add_special_tokens=False).input_ids == [len(words) - 4]
    assert whole == (pre == "llama-bpe")  # a word that is a token needs no merges there


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _json(steps: list[dict[str, Any]], vocab: dict[str, int], merges: list[Any], pre: str) -> str:
    added = [
        {
            "id": i,
            "content": token,
            "special": token != "<think>",
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for token, i in vocab.items()
        if token.startswith("<") and len(token) > 5
    ]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": None,
            "decoder": BYTES,
            "model": {
                "type": "BPE",
                "vocab": vocab,
                "merges": merges,
                "ignore_merges": pre == "llama-bpe",
                "byte_fallback": False,
                "fuse_unk": False,
                "unk_token": None,
                "dropout": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
            },
        }
    )
