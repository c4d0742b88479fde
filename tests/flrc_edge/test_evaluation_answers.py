"""Answers and their scores: both engines, against Hugging Face, the runtime and cases by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.evaluation.answers import forced, greedy
from flrc_edge.evaluation.bertscore import BertScore, greedy_f1
from flrc_edge.evaluation.rouge import Rouge, repetition
from flrc_edge.evaluation.subject import Subject, open_subject
from flrc_runtime import ScriptedStages, load

SCRIPT = (0, 0, 1, 1, 1, 2, 2, 0)


@pytest.fixture(scope="module", params=["checkpoint", "bundle"])
def subject(request: pytest.FixtureRequest, compressed_stories: Any, stories_bundle: Path) -> Subject:
    return open_subject(
        str(compressed_stories.checkpoint if request.param == "checkpoint" else stories_bundle)
    )


@pytest.fixture(scope="module")
def prompt(compressed_stories: Any) -> list[int]:
    ids: list[int] = compressed_stories.source.tokenizer("Once upon a time, there was a red")["input_ids"]
    return ids


def test_greedy_is_what_the_runtime_answers_under_the_same_script(
    subject: Subject, prompt: list[int], stories_bundle: Path
) -> None:
    stream = load(stories_bundle).stream(prompt, max_tokens=12, policy=ScriptedStages(SCRIPT))
    with subject.read(prompt, SCRIPT[0]) as read:
        answer = greedy(read, SCRIPT, ends=subject.facts.ends, most=12)
        assert answer == [t.token_id for t in stream] and len(answer) == 12
        read.rewind()
        assert greedy(read, SCRIPT, ends=frozenset(), most=12) == answer
        read.rewind()
        assert greedy(read, SCRIPT, ends={answer[4]}, most=12) == answer[: answer.index(answer[4]) + 1]


def test_forced_logits_are_those_of_the_cache_the_script_produces(
    subject: Subject, prompt: list[int], stories_bundle: Path
) -> None:
    answer = [300, 17, 260, 401, 290, 18, 299, 5]
    # Answer token i - 1 is fed through the stage of token i; the prompt through that of token 0.
    stages = [SCRIPT[0]] * len(prompt) + list(SCRIPT[1:])
    expected = load(stories_bundle).logits([*prompt, *answer[:-1]], stages=stages)[len(prompt) - 1 :]
    with subject.read(prompt, SCRIPT[0]) as read:
        for _ in range(2):  # the second time behind a rewound cache
            found = forced(read, answer, SCRIPT)
            assert found.shape == (8, 512)
            assert torch.allclose(found, torch.from_numpy(expected), atol=2e-4)
            read.rewind()
        assert torch.allclose(read.logits, found[0])


def test_the_dense_model_answers_as_hugging_face_does(compressed_stories: Any, prompt: list[int]) -> None:
    source = compressed_stories.source
    subject = open_subject(str(source.path))
    ids = torch.tensor([prompt])
    expected = source.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[
        0, len(prompt) :
    ]
    with subject.read(prompt, 0) as read:
        assert greedy(read, (0,), ends=subject.facts.ends, most=20) == expected.tolist()


def test_stages_are_read_where_they_are_asked_for(subject: Subject, prompt: list[int]) -> None:
    logits = [subject.logits(torch.tensor(prompt), s)[-1] for s in (0, 1, 2)]
    for stage in (2, 0, 1):
        with subject.read(prompt, stage) as read:
            assert torch.allclose(read.logits, logits[stage], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=0.1)


def test_rouge_by_hand() -> None:
    rouge = Rouge()
    # Of the reference's 6 words and 5 pairs, the answer's 5 words and 4 pairs hold 5 and 3.
    one, two, longest = rouge("The cat sat on the mat.", "the cat on the mat")
    assert (one, two, longest) == pytest.approx((10 / 11, 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5), 10 / 11))
    assert rouge("jumping dogs", "dog jumped") == pytest.approx((1, 0, 0.5))  # stems; only the order differs
    assert rouge("a b c", "x y z") == (0, 0, 0) and rouge("a b", "") == (0, 0, 0)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3]) == repetition([]) == repetition(range(20)) == 0
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


def test_greedy_matching_by_hand() -> None:
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    answer = torch.tensor([[3.0, 0.0]])  # finds one of two: recall 1/2, precision 1
    assert greedy_f1(reference, answer) == pytest.approx(2 / 3)
    assert greedy_f1(reference, reference * 5) == pytest.approx(1)
    assert greedy_f1(reference, torch.zeros(0, 2)) == 0
    halfway = torch.tensor([[1.0, 1.0]])
    assert greedy_f1(reference, halfway) == pytest.approx(0.5**0.5)


def test_bertscore_with_an_encoder_from_a_folder(tmp_path: Path, compressed_stories: Any) -> None:
    from transformers import BertConfig, BertModel

    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    compressed_stories.source.tokenizer.save_pretrained(folder)
    score = BertScore(folder)
    assert score.name == "encoder" and score("The cat sat.", "The cat sat.") == pytest.approx(1, abs=1e-5)
    other, empty = score("The cat sat.", "It rains."), score("The cat sat.", "")
    assert empty == 0 < other < 0.999
    assert 0 < score("cat " * 200, "dog") < 1  # longer than the encoder reads
