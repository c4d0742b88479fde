"""Recipes of several runs in one result."""

from __future__ import annotations

from typing import Any

import pytest

from flrc_edge import report
from flrc_edge.merged_recipes import merged, put


def result(*figures: tuple[float, str, float], **change: Any) -> dict[str, Any]:
    rows = [
        {"keep": k, "recipe": r, "text": "wiki", "growth": g, "ratio": None, "perplexity": 30.0, "kept": k,
         "factorization": "one-sided", "ranks": "uniform", "storage": "plain", "dense_projections": 0}
        for k, r, g in figures
    ]  # fmt: skip
    return {
        "model": "m",
        "texts": ({"name": "wiki", "tokens": 10, "dense_perplexity": 20.0},),
        "window": 8,
        "calibration": "austen (10)",
        "calibration_tokens": 10,
        "labels": "sampled",
        "figures": tuple(rows),
        "searches": (),
        "seconds": {"perplexity": 1.5},
        "peak_rss_bytes": 100,
        "machine": "here",
    } | change


def test_rows_are_added_and_replaced() -> None:
    earlier = result((0.9, "svd-llm", 1.0), (0.9, "ours", 0.5), (0.8, "svd-llm", 2.0))
    new = result(
        (0.9, "ours", 0.25), (0.8, "healed", 0.5), peak_rss_bytes=50, seconds={"perplexity": 2, "x": 1}
    )
    both = merged(earlier, new)
    assert [(f["keep"], f["recipe"], f["growth"], f["ratio"]) for f in both["figures"]] == [
        (0.9, "svd-llm", 1.0, 1.0),
        (0.9, "ours", 0.25, 0.25),
        (0.8, "svd-llm", 2.0, 1.0),
        (0.8, "healed", 0.5, 0.25),
    ]
    assert both["seconds"] == {"perplexity": 3.5, "x": 1} and both["peak_rss_bytes"] == 100


def test_an_earlier_rank_search_stays() -> None:
    search = {"search": "asvd", "counted": "all", "tokens": 5, "seconds": 9.0}
    assert merged(result(searches=[search]), result())["searches"] == [search]


@pytest.mark.parametrize(
    "change",
    [{"window": 9}, {"calibration": "wiki (5) + austen (5)"}, {"labels": "text"}],
)
def test_other_conditions_stand_beside(change: dict[str, Any]) -> None:
    results: dict[str, Any] = {"m-large": result()}
    put(results, "m", result((0.9, "svd-llm", 1.0)))
    put(results, "m", result((0.8, "ours", 0.5), **change))
    put(results, "m", result((0.8, "svd-llm", 2.0)))
    put(results, "m", result((0.8, "svd-llm", 1.0), **change))
    _, first, second = results
    assert first == "m" and second == "m, conditions 2"
    assert [f["growth"] for f in results["m"]["figures"]] == [1.0, 2.0]
    assert [(f["growth"], f["ratio"]) for f in results[second]["figures"]] == [(0.5, 0.5), (1.0, 1.0)]
    assert results["m-large"] == result()


def test_another_machine_replaces() -> None:
    results: dict[str, Any] = {}
    put(results, "m", result((0.9, "svd-llm", 1.0)))
    put(results, "m", result((0.8, "ours", 0.5), machine="there"))
    assert [f["keep"] for f in results["m"]["figures"]] == [0.8] and len(results) == 1


def test_saved_results_are_merged(tmp_path: Any) -> None:
    path = tmp_path / "benchmarks.json"
    report.save(path, "recipes", "m", result((0.9, "svd-llm", 1.0)))
    report.save(path, "recipes", "m", result((0.9, "ours", 0.5)))
    page = path.with_suffix(".md").read_text()
    assert "| svd-llm |" in page and "| ours |" in page and "| **0.500** | 0.50 |" in page
