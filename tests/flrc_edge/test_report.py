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
        {"keep": keep, "kept": keep - 0.0003, "allocator": a, "factorization": f, "perplexity": p}
        for keep, f, a, p in [
            (0.9, "two-sided", "uniform", 31.239),
            (0.9, "two-sided", "spectrum", 21.5),
            (0.9, "one-sided", "uniform", 45.0),
            (0.9, "one-sided", "spectrum", 46.0),
            (0.8, "two-sided", "uniform", 131.0),
        ]
    ]
    return {
        "figures": figures, "text": "wiki", "evaluation_tokens": 20480, "window": 1024, "calibration": "austen (9)",
        "dense_perplexity": 18.416, "seconds": {"calibrate": 12.34}, "peak_rss_bytes": 3 * 2**30, "machine": "m",
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


def test_allocators_table() -> None:
    complete = comparison(figures=comparison()["figures"][:4])
    text = report.allocators_table(complete)
    assert "| keep | factors | uniform | spectrum | stored |\n|---|---|---|---|---|" in text
    assert "| 0.9 | two-sided | 31.24 | **21.50** | 0.8997 |" in text
    assert "| 0.9 | one-sided | **45.00** | 46.00 | 0.8997 |" in text
    for figure in ("18.42", "20480 tokens", "windows of 1024", "austen (9)", "calibrate 12.3 s", "3.0 GiB"):
        assert figure in text


def test_formats_table() -> None:
    row = {"dtype": "int4", "head": "int8", "weight_bytes": 81_000_000, "perplexity": 19.555, "mean_kl": 0.0512,
           "top1": 0.9123}  # fmt: skip
    text = report.formats_table({"formats": [row], "tokens": 2048, "text": "wiki", "onnxruntime": "1.32"})
    assert "| int4 | int8 | 81.0 | 19.55 | 0.0512 | 91.2 % |" in text.replace("19.56", "19.55")
    assert "2048 tokens of wiki" in text and "1.32" in text


def test_demo_table() -> None:
    text = report.demo_table(DEMO)
    assert "| dense | 1 | 20.00 | 5.00 | 1 | 150.0 |" in text
    assert "| stage 1 | 0.700 | 30.50 | 2.50 | 0.50 | 110.0 |" in text
    assert "> Because\n> so" in text and "> No" in text and "calibrate 60 s" in text and "123.5 MB" in text


def test_save_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "benchmarks.json"
    whole = comparison(figures=comparison()["figures"][:4])
    report.save(path, "allocators", "b-model", whole)
    report.save(path, "demo", "b-model", DEMO)
    report.save(path, "allocators", "a-model", whole)
    report.save(path, "allocators", "b-model", {**whole, "machine": "another"})
    content = json.loads(path.read_text())
    assert content["demo"]["b-model"] == DEMO and set(content["allocators"]) == {"a-model", "b-model"}
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
