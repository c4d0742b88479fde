"""Windows and their figures: what counts, and models whose figures are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flrc_edge.errors import NumericalError, UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.evaluation.subject import Facts
from flrc_edge.evaluation.text import score_text, text_result
from flrc_edge.evaluation.token_scores import log_probs_, token_scores
from flrc_edge.evaluation.torch_subject import loaded_subject
from flrc_edge.evaluation.windows import text_windows
from flrc_edge.texts import WeightedText, token_windows
from flrc_runtime.manifest import Schedule

VOCAB = 50


class Stub:
    """A subject whose logits are a function of stage and ids."""

    facts = Facts(
        "stub",
        "checkpoint",
        "float32",
        "llama",
        VOCAB,
        8,
        1,
        512,
        frozenset(),
        1000,
        (0.9, 0.5),
        Schedule((4,)),
    )
    tokenizer = None

    def __init__(self, logits: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self._logits = logits

    def logits(self, ids: torch.Tensor, stage: int) -> torch.Tensor:
        return self._logits(ids, stage).clone()

    def read(self, prompt: Any, stage: int) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words that adds no BOS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = [f"w{i}" for i in range(VOCAB - 2)] + ["é"]
    tokenizer = Tokenizer(WordLevel({n: i for i, n in enumerate([*names, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * 7 % 48}" for i in range(40)))
    return path


def everything(windows: Any) -> list[int]:
    """The ids that count, in the order of the windows."""
    return [i for row, first in zip(windows.ids.tolist(), windows.first, strict=True) for i in row[first:]]


def test_without_overlap_every_token_after_a_windows_first_counts_once(words: Any, text: Path) -> None:
    w = text_windows(words, str(text), windows=None, length=8)
    ids = words(text.read_text())["input_ids"]
    assert w.ids.shape == (5, 8) and w.ids.flatten().tolist() == ids and w.tokens == 35
    assert everything(w) == [i for n, i in enumerate(ids) if n % 8]


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_with_overlap_every_token_but_the_first_counts_once(words: Any, text: Path, stride: int) -> None:
    w = text_windows(words, str(text), windows=None, length=8, stride=stride)
    ids = words(text.read_text())["input_ids"]
    reached = 8 + (len(w.ids) - 1) * stride
    assert everything(w) == ids[1:reached] and reached + stride > len(ids)
    assert [row.tolist() for row in w.ids] == [ids[s : s + 8] for s in range(0, reached - 7, stride)]


@pytest.mark.parametrize("stride", [None, 5])
def test_with_bos_every_token_counts_once(compressed_stories: Any, stride: int | None) -> None:
    tokenizer = compressed_stories.source.tokenizer
    w = text_windows(tokenizer, "austen-heldout", windows=4, length=16, stride=stride)
    counted = everything(w)
    assert w.bos and (w.ids[:, 0] == tokenizer.bos_token_id).all()
    assert counted == tokenizer(_austen(), add_special_tokens=False)["input_ids"][: len(counted)]
    assert len(counted) == w.tokens == 15 + 3 * (stride or 15)
    assert sum(w.bytes) == len(tokenizer.decode(counted).encode())


def _austen() -> str:
    from flrc_edge.texts import read_text

    return read_text("austen-heldout")


def test_windows_are_those_of_calibration(compressed_stories: Any) -> None:
    tokenizer = compressed_stories.source.tokenizer
    expected = token_windows(tokenizer, (WeightedText("wikitext2-heldout"),), windows=3, length=96).ids
    assert torch.equal(text_windows(tokenizer, "wikitext2-heldout", windows=3, length=96).ids, expected)


def test_bytes_are_those_of_the_tokens_that_count(words: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("w1 é w22  w3 w4 é")
    assert text_windows(words, str(path), windows=2, length=3).bytes == (7, 6)
    assert sum(text_windows(words, str(path), windows=None, length=3, stride=1).bytes) == 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 6}, "holds 40 tokens, 48 are needed"),
        ({"length": 41}, "holds 40 tokens, 41 are needed"),
        ({"windows": 12, "stride": 3}, "holds 40 tokens, 41 are needed"),
        ({"windows": 0}, "number of windows must be at least 1, not 0"),
        ({"length": 1}, "at least 2 tokens, not 1"),
        ({"stride": 0}, "stride must be at least 1 token, not 0"),
    ],
)
def test_windows_that_cannot_be_cut(words: Any, text: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        text_windows(words, str(text), **{"windows": 1, "length": 8, **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a\x00b", "looks binary"),
        (b"\xff\xfe\x80", "is not UTF-8"),
    ],
)
def test_files_that_are_no_text(words: Any, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text_windows(words, str(path), windows=1, length=8)


def test_a_model_that_knows_nothing(words: Any, text: Path) -> None:
    w = text_windows(words, str(text), windows=None, length=8, stride=3)
    uniform = Stub(lambda ids, stage: torch.zeros(len(ids), VOCAB))
    figures = text_result(score_text(uniform, w, stages=(0, 1), dense=uniform)).figures
    assert [f.stage for f in figures] == ["dense", "static:0", "static:1"]
    assert [f.keep for f in figures] == [1, 0.9, 0.5]
    for figure in figures:
        e = figure.estimates
        assert e["perplexity"].value == pytest.approx(VOCAB)
        assert e["bits_per_byte"].value == pytest.approx(w.tokens * math.log2(VOCAB) / sum(w.bytes))
    for figure in figures[1:]:
        assert {k: figure.estimates[k].value for k in ("kl", "kl_p99", "top1")} == {
            "kl": 0,
            "kl_p99": 0,
            "top1": 1,
        }


def test_divergence_and_agreement_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    own = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]]).log()
    found = token_scores(own, torch.tensor([0, 1, 0]), dense=dense)
    assert found.kl is not None and found.top1 is not None
    assert found.nll == pytest.approx(-np.log([0.25, 0.8, 0.3]))
    assert found.kl == pytest.approx(
        [0.25 * math.log(2), 0, 0.2 * math.log(2 / 3) + 0.2 * math.log(2)], abs=1e-7
    )
    assert found.top1.tolist() == [0, 1, 1]


def test_log_probabilities_in_place() -> None:
    logits = torch.randn(300, 40_000, generator=torch.Generator().manual_seed(0))  # more than one piece
    expected = logits[::50].double().log_softmax(-1)
    found = log_probs_(logits)
    assert found.data_ptr() == logits.data_ptr()
    assert torch.allclose(found[::50].double(), expected, atol=1e-5)


def test_a_value_that_is_not_finite_is_an_error(words: Any, text: Path) -> None:
    w = text_windows(words, str(text), windows=3, length=8)

    def broken(ids: torch.Tensor, stage: int) -> torch.Tensor:
        logits = torch.zeros(len(ids), VOCAB)
        if torch.equal(ids, w.ids[1]):
            logits[3, 3] = math.inf if stage else math.nan
        return logits

    for stage in (0, 1):
        with pytest.raises(NumericalError, match=r"window 1 of text\.txt is not finite"):
            score_text(Stub(broken), w, stages=(stage,))


def test_a_divergence_that_is_not_finite_is_an_error() -> None:
    uniform = torch.full((1, 4), 0.25).log()
    impossible = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    with pytest.raises(NumericalError, match="divergence from the dense model on x is not finite"):
        token_scores(impossible, torch.tensor([0]), dense=uniform, where="x")


def test_equals_perplexity_and_its_own_dense_model(compressed_stories: Any) -> None:
    source = compressed_stories.source
    subject = loaded_subject(source)
    w = text_windows(source.tokenizer, "austen-heldout", windows=3, length=96)
    calls: list[Any] = []
    scores = score_text(subject, w, stages=(0,), dense=subject, progress=lambda *c: calls.append(c))
    dense, own = text_result(scores).figures
    assert dense.estimates["perplexity"].value == pytest.approx(
        perplexity(torch_logits(source.model), w.ids), 1e-5
    )
    assert own.estimates["perplexity"] == dense.estimates["perplexity"]
    assert own.estimates["kl"].value == 0 and own.estimates["top1"].value == 1
    assert "kl" not in dense.estimates
    assert calls == [("text austen-heldout", i, 3) for i in (1, 2, 3)]


def test_context_lowers_perplexity_and_a_short_stride_gives_context(compressed_stories: Any) -> None:
    subject = loaded_subject(compressed_stories.source)
    values = []
    for stride in (None, 8):
        w = text_windows(
            subject.tokenizer,
            "austen-heldout",
            windows=32 if stride is None else 61,
            length=17,
            stride=stride,
        )
        scores = score_text(subject, replace(w, name="t"), stages=(0,))
        values.append(text_result(scores).figures[0].estimates["perplexity"].value)
    assert values[1] < values[0]
