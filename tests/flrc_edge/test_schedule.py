"""Where decoding moves on: the measured divergences and the choice of boundaries."""

from __future__ import annotations

from bisect import bisect_right
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flrc_edge
from flrc_edge.errors import NumericalError
from flrc_edge.models import open_model
from flrc_edge.schedule import (
    Answer,
    answers,
    built_in_prompts,
    choose,
    dense_log_probs,
    divergence,
    prompt_ids,
)


def brute_force(
    kl: list[list[float]], kept: list[float], horizon: int, budget: float
) -> tuple[bool, float, float]:
    """Whether any schedule fits, the least divergence of those that do, and the least mean of all."""
    best, cheapest = float("inf"), float("inf")
    for boundaries in combinations_with_replacement(range(1, horizon + 1), len(kept) - 1):
        at = [bisect_right(boundaries, t) for t in range(horizon)]
        mean = sum(kept[s] for s in at) / horizon
        cheapest = min(cheapest, mean)
        if mean <= budget + 1e-9:
            best = min(best, sum(kl[s][t] for t, s in enumerate(at)))
    return best < float("inf"), best, cheapest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choose_equals_brute_force(data: Any) -> None:
    stages, horizon = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 9))
    kl = [[data.draw(st.floats(0, 5)) for _ in range(horizon)] for _ in range(stages)]
    kept = sorted((data.draw(st.floats(0.1, 1)) for _ in range(stages)), reverse=True)
    budget = data.draw(st.floats(0.1, 1))
    result = choose(kl, kept, horizon=horizon, block=1, mean_keep=budget)
    at = [result.stage_at(t) for t in range(horizon)]
    mean = sum(kept[s] for s in at) / horizon
    possible, best, cheapest = brute_force(kl, kept, horizon, budget)
    assert list(result.boundaries) == sorted(result.boundaries) and result.boundaries[0] >= 1
    assert at[0] == 0  # the first token comes with the prompt
    if possible:
        assert mean <= budget + 1e-6
        assert sum(kl[s][t] for t, s in enumerate(at)) == pytest.approx(best, abs=1e-9)
    else:
        assert mean == pytest.approx(cheapest)


def test_blocks_and_default_budget() -> None:
    kl = [[0.1] * 6, [0.2] * 6, [0.6] * 6]
    kept = [0.9, 0.8, 0.7]
    result = choose(kl, kept, horizon=96, block=16)
    mean = sum(kept[result.stage_at(t)] for t in range(96)) / 96
    assert mean <= 0.8 + 1e-6 and all(b == 1 or b % 16 == 0 for b in result.boundaries)
    assert result.horizon == 96 and result.block == 16 and result.divergence == tuple(map(tuple, kl))


def test_early_divergence_delays_the_move() -> None:
    """Half on .9 and half on .7 where small stages hurt early; all on .8 where the last one hurts late."""
    kept = [0.9, 0.8, 0.7]
    early, late = [3.0, 2.0, 1.0, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 1.0, 2.0, 3.0]
    assert choose([[0.0] * 6, early, early], kept).boundaries == (48, 48)
    assert choose([[0.0] * 6, late, [3 * v for v in late]], kept).boundaries[0] <= 16
    for kl in (early, late):
        assert choose([[0.0] * 6, kl], [0.9, 0.6], mean_keep=0.9).boundaries == (96,)  # nothing forces a move


def test_one_stage_has_no_boundary() -> None:
    result = choose([[0.5] * 6], [0.8])
    assert result.boundaries == () and result.stage_at(1000) == 0


def test_many_stages_are_searched_on_a_coarser_grid() -> None:
    stages = 12
    kl = [[0.1 * s] * 6 for s in range(stages)]
    result = choose(kl, [1 - 0.05 * s for s in range(stages)])
    assert len(result.boundaries) == stages - 1


@pytest.fixture(scope="module")
def dense(compressed_stories: Any) -> tuple[Any, list[Answer], list[torch.Tensor]]:
    loaded = compressed_stories.source
    reference = answers(loaded.model, loaded.tokenizer, built_in_prompts()[:3], horizon=40)
    return loaded, reference, dense_log_probs(loaded.model, reference)


def test_answers_are_the_greedy_ones(dense: Any) -> None:
    loaded, reference, _ = dense
    assert len(reference) == 3
    for a, prompt in zip(reference, built_in_prompts(), strict=False):
        assert torch.equal(a.prompt, prompt_ids(loaded.tokenizer, prompt))
        assert a.prompt[0, 0] == loaded.tokenizer.bos_token_id and 1 <= a.answer.shape[1] <= 40
        ids = torch.cat([a.prompt, a.answer], dim=1)
        with torch.no_grad():
            greedy = loaded.model(input_ids=ids[:, :-1]).logits[0].argmax(-1)
        assert torch.equal(greedy[a.prompt.shape[1] - 1 :], a.answer[0])


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
        assert found.shape == (a.answer.shape[1], 512)
        assert torch.equal(found.argmax(-1), a.answer[0])
        assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5)


def test_the_dense_model_does_not_diverge_from_itself(dense: Any) -> None:
    loaded, reference, log_probs = dense
    rows = divergence(loaded.model, reference, log_probs, stages=2, horizon=40, block=10)
    assert len(rows) == 2 and all(len(r) == 4 for r in rows)
    assert max(abs(v) for row in rows for v in row) < 1e-5


def test_divergence_against_two_passes_by_hand(compressed_stories: Any, dense: Any) -> None:
    """The prompt through the stage 0 model, then token by token through another model, on one cache."""
    _, reference, log_probs = dense
    stage_models = [flrc_edge.load(compressed_stories.checkpoint, stage=s) for s in range(3)]
    found = divergence(
        flrc_edge.load(compressed_stories.checkpoint), reference, log_probs, stages=3, horizon=40, block=8
    )
    total, count = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for a, expected in zip(reference, log_probs, strict=True):
            for t in range(a.answer.shape[1]):
                count[t // 8] += 1
            for s in range(3):
                out = stage_models[0](input_ids=a.prompt, use_cache=True)
                for t in range(a.answer.shape[1]):
                    q = out.logits[0, -1].double().log_softmax(-1)
                    p = expected[t].double()
                    total[s, t // 8] += (p.exp() * (p - q)).sum()
                    out = stage_models[s](
                        input_ids=a.answer[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
                    )
    reached = int((count > 0).sum())
    expected_rows = (total[:, :reached] / count[:reached]).tolist()
    for row, wanted in zip(found, expected_rows, strict=True):
        assert row[:reached] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    # Stages 1 and 2 start from the same first token, which stage 0 computed, and part after it.
    assert found[0] != found[1] != found[2] and found[2][0] > found[0][0] > 1e-4


def test_blocks_no_answer_reaches_take_the_last_value(dense: Any) -> None:
    loaded, reference, log_probs = dense
    short = [Answer(a.prompt, a.answer[:, :5]) for a in reference]
    rows = divergence(loaded.model, short, [p[:5] for p in log_probs], stages=1, horizon=40, block=4)
    assert len(rows[0]) == 10 and set(rows[0][1:]) == {rows[0][1]} and rows[0][0] != rows[0][1]


def test_answers_of_one_token(compressed_stories: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    one = [Answer(a.prompt, a.answer[:, :1]) for a in reference]
    model = flrc_edge.load(compressed_stories.checkpoint)
    rows = divergence(model, one, [p[:1] for p in log_probs], stages=3, horizon=8, block=8)
    assert rows[0] == rows[1] == rows[2]  # the one token comes from the prompt, which stage 0 reads


def test_values_that_are_not_finite(compressed_stories: Any, dense: Any) -> None:
    _, reference, log_probs = dense
    model = flrc_edge.load(compressed_stories.checkpoint)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match="stage 0 gives values that are not finite on prompt 0"):
        divergence(model, reference, log_probs, stages=3, horizon=40)


def test_compress_records_what_it_measured(compressed_stories: Any) -> None:
    plan, schedule = compressed_stories.manifest.plan, compressed_stories.manifest.schedule
    assert len(schedule.boundaries) == 2 and schedule.horizon == 96 and schedule.block == 16
    assert len(schedule.divergence) == 3 and all(len(r) == 6 for r in schedule.divergence)
    kept = [plan.kept(s) for s in range(3)]
    again = choose(schedule.divergence, kept)
    assert again == schedule
    assert sum(kept[schedule.stage_at(t)] for t in range(96)) / 96 <= sum(kept) / 3 + 1e-6
