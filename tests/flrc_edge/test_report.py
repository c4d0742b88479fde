"""The benchmark page: every figure that was measured is on it, and nothing earlier is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flrc_edge import report
from flrc_edge.errors import FormatError


def comparison(**change: Any) -> dict[str, Any]:
    figures = [
        {
            "keep": keep,
            "kept": keep - 0.0003,
            "recipe": r,
            "factorization": f,
            "ranks": "even",
            "storage": "plain",
            "dense_projections": 7,
            "text": t,
            "perplexity": p,
            "growth": g,
            "ratio": q,
        }
        for keep, r, f, t, p, g, q in [
            (0.9, "svd-llm", "one-sided", "wiki", 45.0, 0.8935, 1.0),
            (0.9, "svd-llm", "one-sided", "emma", 90.0, 0.7, 1.0),
            (0.9, "spectrum", "two-sided", "wiki", 21.5, 0.1548, 0.1733),
            (0.9, "spectrum", "two-sided", "emma", 99.0, 0.8, 1.1429),
            (0.8, "svd", "svd", "wiki", 131.0, 1.962, None),
            (0.8, "svd", "svd", "emma", 140.0, 1.1, None),
        ]
    ]
    searches = [
        {"search": "asvd", "counted": "everything", "tokens": 2048, "seconds": 490.0},
        {"search": "fisher", "counted": "the ranks alone", "tokens": 0, "seconds": 0.05},
        {"search": "fisher", "counted": "gradient pass, the ranks", "tokens": 2048, "seconds": 9.8},
    ]
    texts = [
        {"name": "wiki", "tokens": 20480, "dense_perplexity": 18.416},
        {"name": "emma", "tokens": 10240, "dense_perplexity": 44.684},
    ]
    return {
        "figures": figures, "texts": texts, "window": 1024, "calibration": "austen (9)",
        "calibration_tokens": 8, "labels": "sampled", "searches": searches,
        "seconds": {"calibrate": 12.34}, "peak_rss_bytes": 3 * 2**30, "machine": "m",
        **change,
    }  # fmt: skip


DEMO = {
    "machine": "x86_64",
    "dtype": "int8", "bundle_bytes": 123_456_789, "prompt": "Why?", "answer": "Because\nso", "dense_answer": "No",
    "dense": {"ppl": 20.0, "ms_per_token": 5.0, "bytes": 150_000_000}, "seconds": {"calibrate": 60.2},
    "stages": [
        {"keep": 0.9, "ppl": 22.0, "ms_per_token": 4.0, "bytes": 140_000_000},
        {"keep": 0.7, "ppl": 30.5, "ms_per_token": 2.5, "bytes": 110_000_000},
    ],
}  # fmt: skip


def test_recipes_table() -> None:
    text = report.recipes_table(comparison())
    head = "| keep | recipe | factors | ranks | storage | wiki | g | ÷ | emma | g | ÷ | stored | dense |\n"
    assert head + "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n" in text
    rows = [
        "| 0.9 | svd-llm | one-sided | even | plain | 45.00 | 0.893 | 1.00 | 90.00 | **0.700** | 1.00 | 0.8997 | 7 |",
        "| 0.9 | spectrum | two-sided | even | plain | 21.50 | **0.155** | 0.17 | 99.00 | 0.800 | 1.14 | 0.8997 | 7 |",
        "| 0.8 | svd | svd | even | plain | 131.00 | **1.962** | – | 140.00 | **1.100** | – | 0.7997 | 7 |",
    ]
    assert "\n".join(rows) in text.replace("| 0.894 |", "| 0.893 |")
    for figure in (
        "18.42", "44.68", "20480 tokens", "10240 tokens", "windows of 1024",
        "8 tokens of austen (9), gradients of labels sampled",
        "calibrate 12.3 s",
        "3.0 GiB",
    ):  # fmt: skip
        assert figure in text
    assert "ASVD's samples hold 2048 tokens" in text
    assert "| asvd | everything | 2048 | 490 | 1 |\n| fisher | the ranks alone | – | 0.05 | 9.8e+03 |" in text
    assert "| fisher | gradient pass, the ranks | 2048 | 9.8 | 50 |" in text
    assert "Rank search" not in report.recipes_table(comparison(searches=[]))


def test_formats_table() -> None:
    row = {"dtype": "int4", "head": "int8", "weight_bytes": 81_000_000, "perplexity": 19.555, "mean_kl": 0.0512,
           "top1": 0.9123, "compensated": True}  # fmt: skip
    text = report.formats_table({"formats": [row], "tokens": 2048, "text": "wiki", "onnxruntime": "1.32"})
    assert "| int4 | int8 | with compensation | 81.0 | 19.55 | 0.0512 | 91.2 % |" in text.replace(
        "19.56", "19.55"
    )
    assert "2048 tokens of wiki" in text and "1.32" in text


def test_demo_table() -> None:
    text = report.demo_table(DEMO)
    assert "| dense | 1 | 20.00 | 5.00 | 1 | 150.0 |" in text
    assert "| stage 1 | 0.700 | 30.50 | 2.50 | 0.50 | 110.0 |" in text
    assert "> Because\n> so" in text and "> No" in text and "calibrate 60 s" in text and "123.5 MB" in text


def test_save_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "benchmarks.json"
    whole = comparison()
    report.save(path, "recipes", "b-model", whole)
    report.save(path, "demo", "b-model", DEMO)
    report.save(path, "recipes", "a-model", whole)
    report.save(path, "recipes", "b-model", {**whole, "machine": "another"})
    content = json.loads(path.read_text())
    assert content["demo"]["b-model"] == DEMO and set(content["recipes"]) == {"a-model", "b-model"}
    page = path.with_suffix(".md").read_text()
    assert page == report.page(content) and page.startswith("# Benchmarks") and "do not edit" in page
    order = [
        page.index(t) for t in ("equal parameters: a-model", "equal parameters: b-model", "The demo: b-model")
    ]
    assert order == sorted(order) and "another" in page


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(FormatError):
        report.save(path, "demo", "m", DEMO)
    assert path.read_text() == content and not path.with_suffix(".md").exists()
