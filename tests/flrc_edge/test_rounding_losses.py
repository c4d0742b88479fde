"""What rounding is said to cost, beside what it does cost, on stories260k."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flrc_edge.embedding_rounding import EMBEDDING, quantize_embedding, replaced_weights
from flrc_edge.input_grams import HEAD, weighted_grams
from flrc_edge.measurements import calibration_windows, measure
from flrc_edge.planning import factorize_all
from flrc_edge.quantization import quantize_compensated, round_to_nearest
from flrc_edge.rounding_losses import (
    DENSE_FORMATS,
    FACTOR_FORMATS,
    RoundingLosses,
    embedding_losses,
    rounding_losses,
)
from flrc_exporters.number_format import NumberFormat


@pytest.fixture(scope="module")
def tried(compressed_stories: Any) -> Any:
    loaded, settings = compressed_stories.source, compressed_stories.settings
    statistics, _ = measure(loaded, settings)
    ids = calibration_windows(loaded, settings).ids
    names = [p.name for p in loaded.config.projections()]
    grams = weighted_grams(loaded.model, names, ids)
    factors = factorize_all(loaded, statistics.moments, storage="pivoted")
    found = rounding_losses(loaded, factors, grams, statistics.moments, storages=("plain", "pivoted"), step=8)
    return loaded, ids, grams, found


def test_fewer_bits_cost_more(tried: Any) -> None:
    *_, found = tried
    for r in found.values():
        assert tuple(r.dense) == DENSE_FORMATS and list(r.dense.values()) == sorted(r.dense.values())
        for storage in ("plain", "pivoted"):
            pairs = r.factored[storage]
            assert tuple(pairs) == FACTOR_FORMATS
            losses = list(pairs.values())
            assert 0 < losses[0] < losses[1] < losses[2]


@torch.no_grad()
@pytest.mark.parametrize("number_format", ["int4/32", "int2/32"])
def test_the_sum_is_about_the_measured_divergence(tried: Any, number_format: str) -> None:
    """KL to the original with every projection rounded alone, summed, beside what was said; within a factor of two."""
    loaded, ids, grams, found = tried
    model, windows = loaded.model, ids[:6]
    log_probs = [model(input_ids=w[None]).logits[0].log_softmax(-1) for w in windows]
    said = measured = 0.0
    for name, r in list(found.items())[::3]:
        weight = model.get_parameter(f"{name}.weight")
        rounded = quantize_compensated(weight, grams[name], NumberFormat.named(number_format))
        with replaced_weights(model, {f"{name}.weight": rounded}):
            for w, p in zip(windows, log_probs, strict=True):
                q = model(input_ids=w[None]).logits[0].log_softmax(-1)
                measured += float((p.exp() * (p - q)).sum(-1).mean()) / len(windows)
        said += r.dense[number_format]
    assert 0.5 < said / measured < 2.0, (said, measured)


def test_packed_and_unpacked(tried: Any) -> None:
    *_, found = tried
    for r in found.values():
        assert RoundingLosses.unpacked(r.packed(), ("plain", "pivoted")) == r
    small = RoundingLosses(dict.fromkeys(DENSE_FORMATS, 0.5))
    assert RoundingLosses.unpacked(small.packed(), ("plain",)) == small


def test_the_heads_errors_are_compensated(tried: Any) -> None:
    loaded, ids, grams, _ = tried
    number_format = NumberFormat.named("int4")
    ours = quantize_embedding(loaded.model, number_format, grams[HEAD])
    assert set(ours) == {EMBEDDING}  # tied
    weight = loaded.model.get_parameter(EMBEDDING).detach()
    before = weight.clone()

    def error(rounded: torch.Tensor) -> float:
        change = weight - rounded
        return float(((change @ grams[HEAD]) * change).sum())

    nearest = round_to_nearest(weight, number_format).dequantize()
    assert error(ours[EMBEDDING].dequantize()) < 0.8 * error(nearest)
    losses = embedding_losses(loaded.model, grams[HEAD], ids[:4], formats=("int8/32", "int4/32"))
    assert 0 < losses["int8/32"] < 0.1 * losses["int4/32"]
    assert torch.equal(loaded.model.get_parameter(EMBEDDING), before)


def test_the_heads_inputs_by_brute_force(tried: Any) -> None:
    loaded, ids, grams, _ = tried
    with torch.no_grad():
        hidden = torch.cat([loaded.model.model(input_ids=w[None]).last_hidden_state[0, :-1] for w in ids])
    expected = hidden.T @ hidden / len(hidden)
    assert (grams[HEAD] - expected).norm() < 1e-4 * expected.norm()
