"""Allocators and number formats side by side, on stories260k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flrc_edge import compare as module
from flrc_edge.compare import compare
from flrc_edge.compression import compress
from flrc_edge.errors import UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.formats import compare_formats
from flrc_edge.texts import WeightedText, token_windows


def test_compare(compressed_stories: Any) -> None:
    source = compressed_stories.source
    kinds = [type(m) for m in source.model.modules()]
    result = compare(source, compressed_stories.settings, keeps=(0.9, 0.7), text="austen-heldout", windows=4)
    assert kinds == [type(m) for m in source.model.modules()]
    assert len(result.figures) == 12  # 2 keeps, 3 allocators, 2 factorizations
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=4, length=256).ids
    dense = perplexity(torch_logits(source.model), ids)
    assert result.dense_perplexity == pytest.approx(dense, abs=1e-3)
    assert result.evaluation_tokens == 4 * 256 and result.window == 256 and result.text == "austen-heldout"
    assert result.calibration_tokens == 4096 and result.model == "stories260k"
    for f in result.figures:
        assert f.keep - 0.03 < f.kept <= f.keep and 0.8 * dense < f.perplexity
    value = {(f.keep, f.allocator, f.factorization): f.perplexity for f in result.figures}
    assert len(value) == 12
    for allocator in ("uniform", "fisher", "spectrum"):
        assert value[0.9, allocator, "two-sided"] < value[0.7, allocator, "two-sided"]
    assert {"calibrate", "factorize two-sided", "factorize one-sided", "allocate spectrum"} <= set(
        result.seconds
    )


def test_a_figure_is_what_the_checkpoint_has(compressed_stories: Any, tmp_path: Any) -> None:
    import flrc_edge

    source, settings = compressed_stories.source, replace(compressed_stories.settings, keep=(0.8,))
    result = compare(
        source, settings, keeps=(0.8,), text="austen-heldout", windows=2, allocators=("fisher",),
        methods=("one-sided",),
    )  # fmt: skip
    chosen = replace(settings, allocator="fisher", factorization="one-sided")
    compress(source, tmp_path / "c", chosen)
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=2, length=256).ids
    value = perplexity(torch_logits(flrc_edge.load(tmp_path / "c")), ids)
    assert [f.perplexity for f in result.figures] == [pytest.approx(value, abs=1e-3)]


def test_what_cannot_be_met_is_refused_before_calibration(
    compressed_stories: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *a, **k: pytest.fail("calibrated"))
    settings = compressed_stories.settings
    with pytest.raises(UsageError, match=r"keep 0.01 is below"):
        compare(compressed_stories.source, settings, keeps=(0.9, 0.01), text="austen-heldout")
    with pytest.raises(UsageError, match="there is no text"):
        compare(compressed_stories.source, settings, keeps=(0.9,), text="nowhere")


def test_formats(compressed_stories: Any) -> None:
    source = compressed_stories.source
    result = compare_formats(source, text="austen-heldout", windows=2, window=128)
    by_name = {(f.dtype, f.head): f for f in result.formats}
    exact = by_name["fp32", "fp32"]
    assert exact.mean_kl == 0 and exact.top1 == 1
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=2, length=128).ids
    assert exact.perplexity == pytest.approx(perplexity(torch_logits(source.model), ids), rel=1e-3)
    sizes = [f.weight_bytes for f in result.formats]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    kls = [f.mean_kl for f in result.formats]
    assert 0 < kls[1] < 0.01 and kls[1] < kls[2] <= kls[3] < 1
    assert all(0.5 < f.top1 <= 1 for f in result.formats) and result.tokens == 256
