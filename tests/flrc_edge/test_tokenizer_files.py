"""One owner of the tokenizer: what any of a folder's files says is in the files written, for whatever reads them."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flrc_edge.errors import FlrcError, FormatError, UnsupportedModelError, UsageError
from flrc_edge.models import open_model
from flrc_edge.texts import read_text, token_windows
from flrc_edge.tokenizer_files import open_tokenizer, save_tokenizer
from flrc_runtime.tokenizer import Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
HOSTILE = [
    "", " ", "  ", "\n", " \n \n", "a" * 300, "\0\1", "é", "e\u0301", "ﬁ", "½²٣४", "👩‍👩‍👧‍👦🏳️‍🌈", "\u202e x",
    "<|end|>", "<|en", "<|end|><|end|>", " <|end|> ", "a<|end|>b", "\n<|end|>\n", "<|END|>", "</s>", "<s> </s>",
    "▁▁ ▁", "<0x0A>", "don't I'LL", "a\u00a0b\u3000c", "\t\t x", "日本語。", "한국어", "ไทย", "😀" * 9, "x\r\ny",
    "\ufeffbom", "\u2028", "<tool>x</tool>", " <tool> ", "tool", "the <pad> end",
]  # fmt: skip
PIECES = [
    "<|end|>", "<tool>", "</s>", "<pad>", " ", "  ", "\n", "Once", "upon", "the", "é", "日", "👍", "1", "a", ".", "'s",
    "▁", "\t", "\u0301",
]  # fmt: skip


def texts(count: int = 2000) -> list[str]:
    """Lines of the shipped texts, some cut by added tokens, and mixtures of what is treated in different ways."""
    rng = random.Random(0)
    lines = [
        line for name in ("wikitext2", "austen") for line in read_text(name).splitlines() if line.strip()
    ]
    real = rng.sample(lines, count // 2)
    cut = [line[: len(line) // 3] + rng.choice(PIECES[:4]) + line[len(line) // 3 :] for line in real[::2]]
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(1, 20))) for _ in range(count // 2)]
    return [*HOSTILE, *real[1::2], *cut, *mixed]


TEXTS = texts()


def byte_level(folder: Path) -> None:
    """Train a small byte-level tokenizer, laid out as SmolLM2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_text("wikitext2").splitlines()[:400], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but a tokenizer: sentencepiece's, as of llama, and a byte-level one. Do not write there."""
    folders = {name: tmp_path_factory.mktemp("vocabulary") / name for name in ("sentencepiece", "byte-level")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copyfile(STORIES / "tokenizer.json", folders["sentencepiece"] / "tokenizer.json")
    byte_level(folders["byte-level"])
    for folder in folders.values():
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
        )
    return folders


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


def in_json(*tokens: dict[str, Any]) -> Callable[[Path], None]:
    """Add tokens to tokenizer.json."""

    def edit(folder: Path) -> None:
        def add(content: dict[str, Any]) -> None:
            first = len(content["model"]["vocab"])
            content["added_tokens"] += [{**FLAGS, "id": first + i, **t} for i, t in enumerate(tokens)]

        change(folder, "tokenizer.json", add)

    return edit


def in_decoder(*tokens: dict[str, Any]) -> Callable[[Path], None]:
    """Name tokens in added_tokens_decoder of tokenizer_config.json."""

    def edit(folder: Path) -> None:
        first = len(json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
        named = {str(first + i): {**FLAGS, **t} for i, t in enumerate(tokens)}
        change(folder, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=named))

    return edit


def in_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "tokenizer_config.json", lambda content: content.update(fields))


def in_map(**fields: Any) -> Callable[[Path], None]:
    """Say special tokens in special_tokens_map.json, and in no other file."""

    def edit(folder: Path) -> None:
        change(folder, "special_tokens_map.json", lambda content: content.update(fields))
        change(folder, "tokenizer_config.json", lambda content: [content.pop(name, None) for name in fields])

    return edit


def in_added_tokens(folder: Path) -> None:
    first = len(json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    change(
        folder, "added_tokens.json", lambda content: content.update({"<|end|>": first, "<tool>": first + 1})
    )


def trained(folder: Path) -> None:
    """Leave truncation and padding on, as a training script does."""
    limits = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<unk>"}
    change(folder, "tokenizer.json", lambda content: content.update(truncation=limits, padding=padding))


END, TOOL = {"content": "<|end|>"}, {"content": "<tool>", "special": False}
# What says something of added tokens, alone or against another file.
SOURCES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "tokenizer.json": (in_json(END, TOOL),),
    "decoder": (in_decoder(END, TOOL),),
    "flags differ": (in_json(END, TOOL), in_decoder({**END, "rstrip": True}, {**TOOL, "lstrip": True})),
    "special in one": (in_json({**END, "special": False}, TOOL), in_decoder(END, {**TOOL, "special": True})),
    "special in the other": (in_json(END, TOOL), in_decoder({**END, "special": False}, TOOL)),
    "named, not flagged": (in_json({**END, "special": False}, TOOL), in_config(eos_token="<|end|>")),
    "further, not flagged": (
        in_json({**END, "special": False}, TOOL),
        in_config(additional_special_tokens=["<|end|>"]),
    ),
    "of the model's own": (in_json({**END, "special": False}, TOOL), in_config(image_token="<|end|>")),
    "map": (in_map(bos_token="<s>", eos_token={**FLAGS, "content": "</s>"}, pad_token="<pad>"),),
    "further in the map": (in_map(additional_special_tokens=["<|end|>"]),),
    "added_tokens.json": (in_added_tokens,),
    "single words": (in_json({**END, "single_word": True}, {**TOOL, "normalized": True}),),
    "training's state": (in_json(END, TOOL), trained),
    "a piece of the vocabulary": (in_config(eos_token="the"),),
}


def written(source: Path, folder: Path) -> Path:
    folder.mkdir()
    save_tokenizer(open_tokenizer(source), folder)
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
@pytest.mark.parametrize("name", list(SOURCES))
def test_ids_and_texts_are_those_of_transformers(
    name: str, kind: str, vocabularies: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(vocabularies[kind], tmp_path / "source"))
    for edit in SOURCES[name]:
        edit(source)
    expected: Any = PreTrainedTokenizerFast.from_pretrained(source)
    folder = written(source, tmp_path / "written")
    runtime, again = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert len(TEXTS) >= 2000
    wanted = expected(TEXTS, padding=False, truncation=False)["input_ids"]
    assert [runtime.encode(text) for text in TEXTS] == wanted
    assert again(TEXTS)["input_ids"] == wanted
    flagged = {i for i, token in expected.added_tokens_decoder.items() if token.special}
    assert runtime.special_ids >= flagged | set(expected.all_special_ids)  # whoever flags them
    for ids in wanted:
        plain = [i for i in ids if i not in runtime.special_ids]
        if kind == "byte-level":  # the other's decoder takes a space from what is left over
            assert runtime.decode_start(ids) == runtime.decode_start(plain)
        assert runtime.decode_start(ids) == again.decode(ids, skip_special_tokens=True)
        if plain == ids:
            assert runtime.decode_start(ids) == expected.decode(ids)


@pytest.mark.full
def test_transformers_4_reads_the_same(vocabularies: dict[str, Path], tmp_path: Path) -> None:
    python = os.environ.get("FLRC_EDGE_OPTIMUM")
    if python is None:
        pytest.skip("FLRC_EDGE_OPTIMUM names no environment with transformers 4 (make test-full makes one)")
    program = """
import json, sys, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, texts = sys.argv[1], json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer(texts)["input_ids"]
print(json.dumps({"ids": ids, "texts": [tokenizer.decode(i, skip_special_tokens=True) for i in ids]}))
"""
    differ = []
    for kind, vocabulary in vocabularies.items():
        for name, edits in SOURCES.items():
            place = tmp_path / kind / name.replace("/", "-")
            source = Path(shutil.copytree(vocabulary, place / "source"))
            for edit in edits:
                edit(source)
            folder = written(source, place / "written")
            done = subprocess.run(
                [python, "-c", program, str(folder)],
                input=json.dumps(TEXTS),
                capture_output=True,
                text=True,
                check=True,
            )
            runtime, found = Tokenizer.from_folder(folder), json.loads(done.stdout)
            assert found["ids"] == [runtime.encode(text) for text in TEXTS], (kind, name)
            differ += [
                (kind, name, text)
                for text, ids, decoded in zip(TEXTS, found["ids"], found["texts"], strict=True)
                # tokenizers 0.22, which transformers 4 has, takes a space from before an added token that is plain text
                if decoded.replace(" ", "") != runtime.decode_start(ids).replace(" ", "")
            ]
    assert differ == []


def test_templates(vocabularies: dict[str, Path], tmp_path: Path) -> None:
    """A template is what transformers resolves: the file before the configuration, of several the default."""
    chat = [{"role": "user", "content": "Hi"}]
    source = Path(shutil.copytree(vocabularies["sentencepiece"], tmp_path / "source"))
    in_config(chat_template="{{ bos_token }}from the configuration", image_token="<image>")(source)
    first = written(source, tmp_path / "first")
    assert Tokenizer.from_folder(first).template.render(chat) == "<s>from the configuration"  # type: ignore[union-attr]
    (source / "chat_template.jinja").write_text(
        "{{ image_token }}from the file\r\n{{ eos_token }}", newline=""
    )
    second = written(source, tmp_path / "second")
    wanted: Any = AutoTokenizer.from_pretrained(source).apply_chat_template(chat, tokenize=False)
    assert Tokenizer.from_folder(second).template.render(chat) == wanted  # type: ignore[union-attr]
    (source / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "the default"}]
    in_config(chat_template=named)(source)
    third = written(source, tmp_path / "third")
    assert Tokenizer.from_folder(third).template.render(chat) == "the default"  # type: ignore[union-attr]
    assert AutoTokenizer.from_pretrained(third).chat_template == {"tools": "x", "default": "the default"}
    in_config(chat_template=named[:1])(source)
    fourth = Tokenizer.from_folder(written(source, tmp_path / "fourth"))
    assert fourth.template is None
    with pytest.raises(UsageError, match=r"has chat templates \(tools\), none of them called default"):
        fourth.encode_chat(chat)


def test_special_tokens_of_a_map_are_in_the_template(vocabularies: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(vocabularies["sentencepiece"], tmp_path / "source"))
    in_map(bos_token="<s>", eos_token="</s>")(source)
    in_config(
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )(source)
    folder = written(source, tmp_path / "written")
    assert not (folder / "special_tokens_map.json").exists()
    template = Tokenizer.from_folder(folder).template
    assert template is not None and template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi</s>"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, (2,)),
        ({"generation": [7, 2]}, (2, 7)),
        ({"tokenizer": "<|end|>"}, (2, 512)),
        ({"generation": 7, "tokenizer": "<|end|>"}, (2, 7, 512)),
        ({"generation": 9999}, (2,)),  # beyond the vocabulary
    ],
)
def test_end_tokens(
    named: dict[str, Any], expected: tuple[int, ...], copied_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever names an end token is heard: config.json, generation_config.json, the tokenizer."""
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    folder = _with_tokens(copied_model("llama"), "<|end|>")
    if "generation" in named:
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": named["generation"], "top_k": 7})
        )
    if "tokenizer" in named:
        in_config(eos_token=named["tokenizer"])(folder)
    loaded = open_model(str(folder))
    assert loaded.config.eos_token_ids == expected
    compress(loaded, tmp_path / "checkpoint", Settings(keep=(1.0,)))
    for file in ("config.json", "generation_config.json", "flrc.json"):
        content = json.loads((tmp_path / "checkpoint" / file).read_text())
        found = content["model"]["eos_token_ids"] if file == "flrc.json" else content["eos_token_id"]
        assert tuple(found if isinstance(found, list) else [found]) == expected
    kept = json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text())
    assert kept.get("top_k") == (7 if "generation" in named else None)


def _with_tokens(folder: Path, *tokens: str) -> Path:
    """Give a random model of 512 rows more tokens, with a row of its embedding each."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.randn(len(tokens), weights[name].shape[1]) * 0.05
        weights[name] = torch.cat([weights[name], more])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, "config.json", lambda content: content.update(vocab_size=512 + len(tokens)))
    in_json(*({"content": token} for token in tokens))(folder)
    return folder


def test_a_template_that_closes_answers_with_no_end_token(
    copied_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = _with_tokens(copied_model("llama"), "<|im_start|>", "<|im_end|>")
    in_config(
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )(folder)
    with caplog.at_level(logging.WARNING):
        open_model(str(folder))
    assert "its chat template closes an answer with <|im_end|> (513), which is no end token" in caplog.text
    caplog.clear()
    in_config(eos_token="<|im_end|>")(folder)
    with caplog.at_level(logging.WARNING):
        open_model(str(folder))
    assert "end token" not in caplog.text


def test_tokens_beyond_the_embedding(
    copied_model: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = copied_model("llama")
    in_config(pad_token="<pad>")(folder)
    with caplog.at_level(logging.WARNING):
        loaded = open_model(str(folder))
    assert "beyond the 512 rows of the embedding (<pad> is 512)" in caplog.text
    path = tmp_path / "padded.txt"
    path.write_text("Once upon a time <pad> there was. " * 50)
    from flrc_edge.texts import WeightedText

    size = loaded.config.vocab_size
    with pytest.raises(
        UsageError, match=r"padded\.txt holds '<pad>', token 512, and the model's embedding has 512"
    ):
        token_windows(loaded.tokenizer, (WeightedText(str(path)),), windows=2, length=32, vocab_size=size)
    assert token_windows(loaded.tokenizer, (WeightedText("austen"),), windows=2, length=32, vocab_size=size)


def test_a_class_that_reads_otherwise_is_named(
    copied_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied_model("llama")
    with caplog.at_level(logging.WARNING):
        open_model(str(folder))
    assert "reads" not in caplog.text
    in_config(tokenizer_class="LlamaTokenizerFast", legacy=False)(folder)
    with caplog.at_level(logging.WARNING):
        loaded = open_model(str(folder))
    assert "transformers' LlamaTokenizer reads " in caplog.text
    assert "otherwise than tokenizer.json says; tokenizer.json is taken" in caplog.text
    assert (
        loaded.tokenizer("</s>user")["input_ids"]
        == PreTrainedTokenizerFast.from_pretrained(STORIES)("</s>user")["input_ids"]
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_named(name: str, copied_model: Callable[..., Path]) -> None:
    folder = copied_model("llama")
    (folder / "tokenizer.json").rename(folder / name)
    with pytest.raises(FlrcError, match=f"holds its tokenizer as {name}, without a tokenizer.json"):
        open_model(str(folder))


def test_what_cannot_be_read(copied_model: Callable[..., Path]) -> None:
    folder = copied_model("llama")
    in_config(split_special_tokens=True)(folder)
    with pytest.raises(UnsupportedModelError, match="split_special_tokens is set"):
        open_model(str(folder))
    in_config(split_special_tokens=False, chat_template="{% for %}")(folder)
    with pytest.raises(FormatError, match="the chat template is not valid"):
        open_model(str(folder))
    (folder / "tokenizer_config.json").unlink()  # transformers needs none
    assert open_model(str(folder)).tokenizer("Once")["input_ids"][1:] == [403]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="the tokenizer cannot be read"):
        open_model(str(folder))
