"""Greedy decoding with changing stages, and the divergence from the dense model that it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flrc_edge
from flrc_edge.decoding import (
    Answer,
    answer_log_probs,
    answer_text,
    answers,
    end_tokens,
    greedy,
    prompt_ids,
    read_prompt,
)
from flrc_edge.divergence import dense_log_probs, divergence, schedule_divergence, token_divergence
from flrc_edge.errors import NumericalError
from flrc_edge.lowrank import LowRankLinear
from flrc_edge.models import open_model
from flrc_runtime.manifest import Schedule

PROMPTS = ["Once upon a time", "Lily and Ben went to the park. They saw a big red", "The cat sat."]


@pytest.fixture(scope="module")
def dense(compressed_stories: Any) -> tuple[Any, list[Answer], list[torch.Tensor]]:
    loaded = compressed_stories.source
    prompts = [prompt_ids(loaded.tokenizer, p) for p in PROMPTS]
    reference = answers(loaded.model, prompts, most=40)
    return loaded, reference, dense_log_probs(loaded.model, reference)


@pytest.fixture(scope="module")
def model(compressed_stories: Any) -> Any:
    return flrc_edge.load(compressed_stories.checkpoint)


def stages_of(model: Any) -> set[int]:
    return {m.stage for m in model.modules() if isinstance(m, LowRankLinear)}


def test_answers_are_the_greedy_ones(dense: Any) -> None:
    """In one padded batch, though the prompts differ in length; and in the order asked."""
    loaded, reference, _ = dense
    lengths = {a.prompt.shape[1] for a in reference}
    assert len(lengths) == 3
    for a, prompt in zip(reference, PROMPTS, strict=True):
        assert torch.equal(a.prompt, prompt_ids(loaded.tokenizer, prompt))
        assert a.prompt[0, 0] == loaded.tokenizer.bos_token_id and a.length == a.answer.shape[1] == 40
        ids = torch.cat([a.prompt, a.answer], dim=1)
        with torch.no_grad():
            expected = loaded.model(input_ids=ids[:, :-1]).logits[0].argmax(-1)
        assert torch.equal(expected[a.prompt.shape[1] - 1 :], a.answer[0])


def test_greedy_follows_the_stages(compressed_stories: Any, model: Any, dense: Any) -> None:
    """Every token from the model of its stage, by hand, on one cache; the prompt by the first token's stage."""
    _, reference, _ = dense
    models = [flrc_edge.load(compressed_stories.checkpoint, stage=s) for s in range(3)]
    for stage_at in (Schedule((5, 12)).stage_at, lambda t: 2, lambda t: (2, 0)[t % 2]):
        found = greedy(model, [a.prompt for a in reference], stage_at, most=20)
        assert stages_of(model) == {0}
        for a, ids in zip(reference, found, strict=True):
            inputs, cache, expected = a.prompt, None, []
            for t in range(20):
                with torch.no_grad():
                    out = models[stage_at(t)](input_ids=inputs, past_key_values=cache, use_cache=True)
                inputs, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                expected.append(int(inputs))
            assert ids[0].tolist() == expected
    static = [greedy(model, [reference[0].prompt], lambda t, s=s: s, most=20)[0].tolist() for s in range(3)]
    assert len({str(s) for s in static}) == 3


def test_an_end_token_ends_one_answer_not_the_batch(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, reference, _ = dense
    end = int(reference[0].answer[0, 7])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end, 511])
    assert {end, 511, loaded.model.config.eos_token_id} == set(end_tokens(loaded.model))
    found = answers(loaded.model, [a.prompt for a in reference], most=40)
    for a, b in zip(reference, found, strict=True):
        ids = a.answer[0].tolist()
        assert b.answer[0].tolist() == (ids[: ids.index(end) + 1] if end in ids else ids)
    assert found[0].length <= 8 and max(b.length for b in found) > 8


def test_many_prompts_go_in_batches_in_order(dense: Any) -> None:
    loaded, reference, _ = dense
    done = []
    prompts = [reference[i % 3].prompt for i in range(10)]
    found = answers(loaded.model, prompts, most=3, progress=lambda *step: done.append(step))
    assert [torch.equal(f.answer, reference[i % 3].answer[:, :3]) for i, f in enumerate(found)] == [True] * 10
    assert done == [("answers", 8, 10), ("answers", 10, 10)]


def test_text_of_an_answer(dense: Any) -> None:
    loaded, reference, _ = dense
    ends = torch.tensor([[loaded.tokenizer.eos_token_id]])
    ended = Answer(reference[0].prompt, torch.cat([reference[0].answer, ends], dim=1))
    text = answer_text(loaded.tokenizer, ended)
    assert len(text) > 20 and text == answer_text(loaded.tokenizer, reference[0]) and "</s>" not in text


def test_prompts_go_through_the_chat_template(stories: Any) -> None:
    tokenizer = open_model(str(stories)).tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} bot:{% endif %}"
    )
    ids = prompt_ids(tokenizer, "Hi")[0].tolist()
    assert ids == tokenizer("<s>user:Hi bot:", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_dense_log_probs(dense: Any) -> None:
    _loaded, reference, log_probs = dense
    for a, found in zip(reference, log_probs, strict=True):
        assert found.shape == (a.length, 512)
        assert torch.equal(found.argmax(-1), a.answer[0])
        assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5)


def test_the_dense_model_does_not_diverge_from_itself(dense: Any) -> None:
    loaded, reference, log_probs = dense
    rows = divergence(loaded.model, reference, log_probs, stages=2, horizon=40, block=10)
    assert len(rows) == 2 and all(len(r) == 4 for r in rows)
    assert max(abs(v) for row in rows for v in row) < 1e-5
    assert abs(schedule_divergence(loaded.model, reference, log_probs, lambda t: 0)) < 1e-5


def by_hand(models: Any, answer: Answer, dense: torch.Tensor, stage_at: Any) -> list[float]:
    """KL of every token, one at a time, each through a model of its stage, on one cache."""
    result, inputs, cache = [], answer.prompt, None
    for t in range(answer.length):
        with torch.no_grad():
            out = models[stage_at(t)](input_ids=inputs, past_key_values=cache, use_cache=True)
        q, p = out.logits[0, -1].double().log_softmax(-1), dense[t].double()
        result.append(float((p.exp() * (p - q)).sum()))
        inputs, cache = answer.answer[:, t : t + 1], out.past_key_values
    return result


def test_schedule_divergence_against_single_steps(compressed_stories: Any, model: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    models = [flrc_edge.load(compressed_stories.checkpoint, stage=s) for s in range(3)]
    means = []
    for stage_at in (Schedule((8, 20)).stage_at, Schedule((1, 1)).stage_at, lambda t: 2 - t % 3):
        expected = [by_hand(models, a, d, stage_at) for a, d in zip(reference, log_probs, strict=True)]
        for a, d, wanted in zip(reference, log_probs, expected, strict=True):
            found = token_divergence(model, a, d, stage_at)
            assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        mean = schedule_divergence(model, reference, log_probs, stage_at)
        assert mean == pytest.approx(sum(map(sum, expected)) / 120, rel=1e-3)
        assert stages_of(model) == {0}
        means.append(mean)
    assert 0 < means[0] < means[1] and len(set(means)) == 3


def test_stage_divergence_is_that_of_constant_schedules(model: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    done = []
    rows = divergence(
        model, reference, log_probs, stages=3, horizon=40, block=8, progress=lambda *step: done.append(step)
    )
    assert done == [("schedule", i, 3) for i in (1, 2, 3)]
    for stage, row in enumerate(rows):
        kl = torch.stack(
            [
                token_divergence(model, a, d, lambda t, s=stage: s if t else 0)
                for a, d in zip(reference, log_probs, strict=True)
            ]
        )
        assert row == pytest.approx(kl.reshape(3, 5, 8).mean((0, 2)).tolist(), rel=1e-5, abs=1e-7)
    assert sum(rows[0]) < sum(rows[1]) < sum(rows[2]) and rows[0][0] > 1e-4


def test_a_prompt_read_once_serves_every_schedule(model: Any, dense: Any) -> None:
    _, reference, _ = dense
    prompt = read_prompt(model, reference[1])
    for stage_at in (lambda t: 0, Schedule((4, 9)).stage_at, lambda t: 0):
        again = answer_log_probs(model, reference[1], stage_at, prompt=prompt)
        assert torch.equal(again, answer_log_probs(model, reference[1], stage_at))
    assert prompt[1].get_seq_length() == reference[1].prompt.shape[1]


def test_answers_of_several_lengths_weigh_by_their_tokens(model: Any, dense: Any) -> None:
    """A block's mean is over the tokens in it; blocks no answer reaches take the last value."""
    _, reference, log_probs = dense
    cut = (5, 12, 1)
    short = [Answer(a.prompt, a.answer[:, :n]) for a, n in zip(reference, cut, strict=True)]
    expected = [d[:n] for d, n in zip(log_probs, cut, strict=True)]
    rows = divergence(model, short, expected, stages=3, horizon=40, block=4)
    kl = [
        token_divergence(model, a, d, lambda t: 2 if t else 0) for a, d in zip(short, expected, strict=True)
    ]
    assert rows[2][0] == pytest.approx(float(torch.cat([k[:4] for k in kl]).mean()))
    assert rows[2][1] == pytest.approx(float(torch.cat([k[4:8] for k in kl]).mean()))
    assert len(rows[2]) == 10 and set(rows[2][2:]) == {rows[2][2]} and rows[2][2] != rows[2][1]


def test_answers_of_one_token(model: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    one = [Answer(a.prompt, a.answer[:, :1]) for a in reference]
    rows = divergence(model, one, [p[:1] for p in log_probs], stages=3, horizon=8, block=8)
    assert rows[0] == rows[1] == rows[2]  # the one token comes from the prompt, which stage 0 reads


def test_values_that_are_not_finite(compressed_stories: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    broken = flrc_edge.load(compressed_stories.checkpoint)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match="stage 0 gives values that are not finite at answer token 0"):
        divergence(broken, reference, log_probs, stages=3, horizon=40)
    with pytest.raises(NumericalError, match="stage 2 gives values that are not finite at answer token 0"):
        greedy(broken, [reference[0].prompt], lambda t: 2, most=4)
    assert stages_of(broken) == {0}
