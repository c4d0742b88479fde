"""Perplexity: its definition, and that nothing is silently left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.errors import NumericalError
from flrc_edge.evaluation.bundle_perplexity import bundle_logits, bundle_perplexity
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.texts import WeightedText, token_windows


@pytest.fixture(scope="module")
def ids(compressed_stories: Any) -> torch.Tensor:
    tokenizer = compressed_stories.source.tokenizer
    return token_windows(tokenizer, (WeightedText("wikitext2-heldout"),), windows=3, length=96).ids


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary() -> None:
    rows = torch.randint(0, 50, (3, 20))
    assert perplexity(lambda ids: torch.zeros(ids.shape[1], 50), rows) == pytest.approx(50)


def test_a_model_that_knows_the_next_token_has_one() -> None:
    rows = torch.randint(0, 50, (3, 20))

    def oracle(ids: torch.Tensor) -> torch.Tensor:
        following = torch.cat([ids[0, 1:], ids[0, :1]])
        return torch.nn.functional.one_hot(following, 50).float() * 100

    assert perplexity(oracle, rows) == pytest.approx(1)


def test_equals_the_models_own_loss(compressed_stories: Any, ids: torch.Tensor) -> None:
    model = compressed_stories.source.model
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss for w in ids]
    expected = torch.stack(losses).mean().exp().item()
    calls = []
    value = perplexity(torch_logits(model), ids, progress=lambda *c: calls.append(c), phase="p")
    assert value == pytest.approx(expected, rel=1e-5)
    assert calls == [("p", 1, 3), ("p", 2, 3), ("p", 3, 3)]


def test_a_window_that_is_not_finite_is_an_error(ids: torch.Tensor) -> None:
    def logits(window: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(window.shape[1], 512)
        if torch.equal(window[0], ids[1]):
            result[4, 4] = float("nan")
        return result

    with pytest.raises(NumericalError, match="evaluation window 1 is not finite"):
        perplexity(logits, ids)


def test_every_stage_of_a_bundle_equals_torch(
    compressed_stories: Any, stories_bundle: Path, ids: torch.Tensor
) -> None:
    import flrc_edge
    from flrc_runtime import load

    bundle = load(stories_bundle, threads=1)
    values = []
    for stage in range(3):
        model = flrc_edge.load(compressed_stories.checkpoint, stage=stage)
        expected = perplexity(torch_logits(model), ids)
        values.append(bundle_perplexity(bundle, ids, stage=stage))
        assert values[-1] == pytest.approx(expected, rel=1e-4)
    assert len({round(v, 3) for v in values}) == 3  # each stage is another model
    assert bundle_logits(bundle, 1)(ids[:1]).shape == (96, 512)
