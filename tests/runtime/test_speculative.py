"""Drafts of a late stage: the answer is stage 0's, token for token, or drawn as stage 0 draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flrc_exporters.bundle import export
from flrc_runtime import FixedStage, NumericalError, Sampling, Speculation, UsageError, generate, load
from flrc_runtime.engine import Model
from flrc_runtime.sampling import Sampler
from flrc_runtime.speculative import PROBE, DraftLength, Speculator

PROMPTS = ("Once upon a time", "Tom and Lily", "The little dog was", "One day, a bird", "Mom said")


@pytest.mark.parametrize(
    "speculation",
    [Speculation(), Speculation(most=1, adaptive=False), Speculation(stage=1, most=7, adaptive=False)],
    ids=repr,
)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(repetition_penalty=1.3)], ids=["greedy", "penalty"]
)
def test_the_same_tokens_as_stage_0(model: Model, speculation: Speculation, sampling: Sampling) -> None:
    for prompt in PROMPTS:
        expected = generate(model, prompt, max_tokens=120, sampling=sampling, policy=FixedStage(0))
        found = generate(model, prompt, max_tokens=120, sampling=sampling, speculation=speculation)
        assert found.token_ids == expected.token_ids and found.text == expected.text
        assert set(found.stage_of_token) == {0} and found.finish_reason == expected.finish_reason


@pytest.mark.parametrize(
    ("dtype", "cache"), [("int8", "float16"), ("int4", "float16"), ("int4", "int8")], ids=str
)
def test_the_same_tokens_in_integers(dtype: Any, cache: Any, bundle: Any, tmp_path: Path) -> None:
    """Activations are rounded, too; a step and a pass over several tokens round them alike."""
    export(bundle.folder.parent / "checkpoint", tmp_path / "bundle", dtype=dtype, cache=cache)
    model = load(tmp_path / "bundle", threads=1)
    for prompt in PROMPTS:
        expected = generate(model, prompt, max_tokens=120, policy=FixedStage(0))
        found = generate(model, prompt, max_tokens=120, speculation=Speculation(most=5, adaptive=False))
        assert found.token_ids == expected.token_ids and set(found.stage_of_token) == {0}


def test_stop_strings_the_end_of_the_context_and_a_full_answer(bundle: Any) -> None:
    short = load(bundle.folder, context=32, threads=1)
    always = Speculation(most=7, adaptive=False)
    expected = generate(short, "Once upon a time", policy=FixedStage(0))
    found = generate(short, "Once upon a time", speculation=always)
    assert found.token_ids == expected.token_ids and found.finish_reason == "length"
    stopped = generate(short, "Once upon a time", speculation=always, stop=("girl",))
    assert stopped.text == ", there was a little " and stopped.finish_reason == "stop"
    assert len(generate(short, "Once upon a time", speculation=always, max_tokens=3).token_ids) == 3


def test_the_cache_holds_stage_0_after_every_round(model: Model, positions: Any) -> None:
    ids = model.tokenizer.encode("Once upon a time")
    decoder, plain = model.decoder(), model.decoder()
    sampler = Sampler(Sampling())
    token = sampler(decoder.prefill(ids, 0), stage=0, position=0)
    plain.prefill(ids, 0)
    speculator = Speculator(decoder, sampler, Speculation(most=4, adaptive=False), stages=2)
    for _ in range(6):
        found = speculator.round(token)
        for each in (token, *found[:-1]):
            plain.step(each, 0)
        assert decoder.length == plain.length
        for a, b in zip(positions(decoder.cache), positions(plain.cache), strict=True):
            assert np.array_equal(a[:, : plain.length], b[:, : plain.length])  # to the last bit
        token = found[-1]
    assert 0 < speculator.kept < speculator.drafted  # stage 1 is another model


# Float32 logits whose probabilities differ in the last bit of one token, which no other token has instead.
ALMOST, EQUAL = [0.0, 0.0, 0.0, 0.0, -2.2e-16], [0.0] * 5


@given(st.lists(st.floats(-4, 4), min_size=5, max_size=5), st.lists(st.floats(-4, 4), min_size=5, max_size=5))
@example(p=ALMOST, q=EQUAL)
@example(p=EQUAL, q=ALMOST)
def test_a_verified_draft_is_distributed_as_the_verifier(p: list[float], q: list[float]) -> None:
    """Summed over all drafts and both outcomes, by the numbers that decide them."""
    wanted, drafting = np.array(p, np.float32), np.array(q, np.float32)
    settings = Sampling(temperature=0.8, top_p=0.9)
    sampler = Sampler(settings)
    target, chances = sampler._chances(wanted), sampler._chances(drafting)
    total = np.zeros(5)
    for draft in np.flatnonzero(chances):
        kept = min(1.0, target[draft] / chances[draft])
        total[draft] += chances[draft] * kept
        if kept < 1:
            rest = np.maximum(target - chances, 0)
            total += chances[draft] * (1 - kept) * (rest / rest.sum() if rest.any() else target)
    np.testing.assert_allclose(total, target, atol=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_draft_that_only_rounding_refuses_is_drawn_anew() -> None:
    sampler, wanted = Sampler(Sampling(temperature=0.8)), np.array(EQUAL, np.float32)
    target = sampler._chances(wanted)
    draft, chances = 4, target.copy()
    chances[draft] = np.nextafter(target[draft], 1)
    numbers = iter([1 - 2**-53, 0.6])  # the largest there is: only this one refuses
    sampler._random = SimpleNamespace(random=lambda: next(numbers))  # type: ignore[assignment]
    token, accepted = sampler.verified(wanted, draft, chances, stage=0, position=0)
    assert not accepted
    assert token == np.searchsorted(np.cumsum(target), 0.6, side="right")


def test_drawn_tokens_have_the_frequencies_of_stage_0() -> None:
    rng = np.random.default_rng(0)
    wanted, drafting = rng.normal(size=(2, 8)).astype(np.float32) * 1.5
    sampler = Sampler(Sampling(temperature=1.0, top_k=6, seed=3))
    counts, accepted = np.zeros(8), 0
    for _ in range(20_000):
        draft, chances = sampler.draft(drafting, after=(), stage=1, position=0)
        token, kept = sampler.verified(wanted, draft, chances, stage=0, position=0)
        counts[token] += 1
        accepted += kept
    target, chances = sampler._chances(wanted), sampler._chances(drafting)
    assert np.abs(counts / 20_000 - target).max() < 4 * 0.5 / np.sqrt(20_000)
    assert accepted / 20_000 == pytest.approx(np.minimum(target, chances).sum(), abs=0.02)


def test_sampled_answers_repeat_with_their_seed(model: Model) -> None:
    sampling = Sampling(temperature=0.9, top_k=40, seed=7)
    always = Speculation(most=3, adaptive=False)  # what adapts to time draws in another order every run
    first = generate(model, PROMPTS[0], max_tokens=60, sampling=sampling, speculation=always)
    again = generate(model, PROMPTS[0], max_tokens=60, sampling=sampling, speculation=always)
    assert first.token_ids == again.token_ids and len(first.token_ids) == 60


def rounds(length: DraftLength, *, rate: float, draft: float, verify: float, count: int) -> list[int]:
    """Drafts of each round where a draft is kept with a chance and a pass takes ``1 + verify`` a draft."""
    rng = np.random.default_rng(1)
    chosen = []
    for _ in range(count):
        k = length()
        kept = next((i for i in range(k) if rng.random() > rate), k)
        length.note(k, kept, draft_seconds=k * draft, verify_seconds=1 + verify * k)
        chosen.append(k)
    return chosen


def test_many_drafts_where_they_are_cheap_and_right() -> None:
    assert np.mean(rounds(DraftLength(6), rate=0.95, draft=0.1, verify=0.02, count=200)[-50:]) >= 5


def test_few_where_they_are_mostly_wrong_and_none_where_they_cost_too_much() -> None:
    some = rounds(DraftLength(6), rate=0.5, draft=0.15, verify=0.02, count=200)[-50:]
    assert 1 <= np.mean(some) <= 3
    none = rounds(DraftLength(6), rate=0.6, draft=0.8, verify=0.3, count=400)[-300:]
    assert none.count(0) >= 280 and none.count(1) >= 300 // (PROBE + 2) - 1  # and tries again now and then


@pytest.mark.parametrize(
    ("speculation", "message"),
    [(Speculation(stage=0), "cannot draft"), (Speculation(stage=2), "cannot draft"), (None, "most 0")],
)
def test_mistakes(model: Model, speculation: Speculation | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.stream("Hello", speculation=speculation or Speculation(most=0))


def test_no_policy_beside_it(model: Model) -> None:
    with pytest.raises(UsageError, match="takes no policy"):
        model.stream("Hello", speculation=Speculation(), policy=FixedStage(1))


def test_logits_that_are_not_finite_are_an_error() -> None:
    sampler, bad = Sampler(Sampling(temperature=1.0)), np.full(4, np.nan, np.float32)
    with pytest.raises(NumericalError, match="stage 1"):
        sampler.draft(bad, after=(), stage=1, position=3)
    with pytest.raises(NumericalError, match="stage 0"):
        sampler.verified(bad, 1, np.full(4, 0.25), stage=0, position=3)
