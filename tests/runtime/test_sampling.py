"""Sampling: what may be drawn, how often, and the same again for a seed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flrc_runtime import NumericalError, Sampling, UsageError
from flrc_runtime.sampling import Sampler, distribution

logits = arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-30, 30, width=32, allow_subnormal=False), unique=True
)  # unique: ties may be cut either way, and a processor may take the smallest numbers for zeros


def draw(scores: np.ndarray, sampling: Sampling, seen: tuple[int, ...] = ()) -> int:
    return Sampler(sampling, seen)(scores, stage=0, position=0)


@given(logits)
def test_greedy_is_argmax(scores: np.ndarray) -> None:
    assert draw(scores, Sampling()) == int(scores.argmax())
    assert draw(scores, Sampling(top_k=3, top_p=0.5, seed=1)) == int(scores.argmax())


@given(logits, st.integers(0, 250), st.floats(0.01, 1), st.floats(0.05, 5))
def test_distribution_is_the_restricted_softmax(
    scores: np.ndarray, top_k: int, top_p: float, temperature: float
) -> None:
    """Against the plain definition: sort everything, cut, renormalize."""
    ids, probabilities = distribution(scores, Sampling(temperature, top_k=top_k, top_p=top_p))
    order = np.argsort(-scores, kind="stable")[: top_k or None]
    full = np.exp((scores[order].astype(np.float64) - float(scores.max())) / temperature)
    full /= full.sum()
    allowed = order[np.cumsum(full) - full < top_p + 1e-9]
    certain = order[np.cumsum(full) - full < top_p - 1e-9]
    assert set(certain) <= set(ids) <= set(allowed)
    assert math.isclose(probabilities.sum(), 1)
    of_id = dict(zip(order, full, strict=True))
    mass = sum(of_id[i] for i in ids)
    assert np.allclose(probabilities, [of_id[i] / mass for i in ids], atol=1e-9)


@given(logits, st.integers(0, 20), st.floats(0.1, 1), st.integers(0, 2**32))
def test_a_seed_repeats_and_stays_inside(scores: np.ndarray, top_k: int, top_p: float, seed: int) -> None:
    sampling = Sampling(1.0, top_k=top_k, top_p=top_p, seed=seed)
    one, other = Sampler(sampling), Sampler(sampling)
    drawn = [one(scores, stage=0, position=0) for _ in range(5)]
    assert drawn == [other(scores, stage=0, position=0) for _ in range(5)]
    assert set(drawn) <= set(distribution(scores, sampling)[0])


def test_draws_follow_the_distribution() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(1.0, seed=0))
    counts = np.bincount([sampler(scores, stage=0, position=0) for _ in range(20_000)], minlength=4)
    assert np.abs(counts / 20_000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.02


def test_large_vocabulary_with_a_flat_head() -> None:
    """top_p that needs more than the first partial sorts."""
    scores = np.zeros(50_000, np.float32)
    ids, probabilities = distribution(scores, Sampling(1.0, top_p=0.5))
    assert len(ids) in (25_000, 25_001) and np.allclose(probabilities, 1 / len(ids))


@settings(deadline=None)  # the first call imports transformers
@given(
    logits.filter(lambda s: len(s) > 4),
    st.lists(st.integers(0, 4), max_size=6),
    st.floats(0.1, 10),
)
def test_penalty_equals_hugging_face(scores: np.ndarray, seen: list[int], penalty: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    mine = scores
    if penalty != 1:
        mine = Sampler(Sampling(repetition_penalty=penalty), seen)._penalize(scores)
    if not seen:
        assert np.array_equal(mine, scores)
        return
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), torch.tensor(scores)[None].clone())[0].numpy()
    assert np.allclose(mine, expected, rtol=1e-6)


def test_penalty_covers_the_answer_too() -> None:
    scores = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), seen=[2])
    assert [sampler(scores, stage=0, position=i) for i in range(2)] == [0, 1]
    assert scores[0] == 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    scores = np.array([1.0, 3.0, 2.0], np.float32)
    assert {draw(scores, Sampling(temperature, top_p=p, seed=0)) for p in (0.5, 1)} == {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_must_be_finite(value: float) -> None:
    scores = np.array([0, value, 1], np.float32)
    with pytest.raises(NumericalError, match=r"stage 2 .* position 17"):
        Sampler(Sampling())(scores, stage=2, position=17)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", v) for v in (-0.1, 101, math.inf, math.nan, "1", True, None)),
        *(("top_k", v) for v in (-1, 1.5, True)),
        *(("top_p", v) for v in (0, 0.0, 1.1, -1, math.nan)),
        *(("repetition_penalty", v) for v in (0, -1, 11, math.inf, math.nan)),
        *(("seed", v) for v in (-1, 1.5, "a")),
    ],
)
def test_ranges_are_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{field} .* is not "):
        Sampling(**{field: value})
