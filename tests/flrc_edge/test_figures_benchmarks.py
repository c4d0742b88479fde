"""The pictures of the benchmark page: from which results, what they show, and where they lie."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flrc_edge import report
from flrc_edge.errors import FormatError
from flrc_edge.figures.benchmarks import pictures, recipe_series, write_pictures


def recipe(name: str, keep: float, growth: float, **change: Any) -> dict[str, Any]:
    return {"recipe": name, "keep": keep, "growth": growth, "text": "wiki", "factorization": "one-sided",
            "ranks": "uniform", "storage": "plain"} | change  # fmt: skip


RECIPES = [
    *(recipe("svd-llm", k, g) for k, g in ((0.8, 1.2), (0.9, 0.8))),
    *(recipe("flra-a", k, g, ranks="fisher gw2") for k, g in ((0.8, 0.5), (0.9, 0.4))),
    *(recipe("flra-b", k, g, ranks="fisher g2-sum") for k, g in ((0.8, 0.6), (0.9, 0.2))),
    *(
        recipe("spectrum", k, g, ranks="spectrum", factorization="two-sided")
        for k, g in ((0.8, 0.3), (0.9, 0.1))
    ),
    *(recipe("svd-llm", k, g, text="emma") for k, g in ((0.8, 1.5), (0.9, 0.9))),
]


POINTS = [
    {"series": series, "role": role, "label": label, "bytes": size, "text": text, "perplexity": ppl}
    for text, worse in (("wiki", 1.0), ("emma", 2.0))
    for series, role, label, size, ppl in (
        ("ours, int4", "ours", ".8", 80e6, 30.0 * worse),
        ("ours, int4", "ours", ".6", 60e6, 50.0 * worse),
        ("dense", "dense", "int4", 90e6, 32.0 * worse),
    )
]


def test_frontier() -> None:
    found = pictures("frontier", "org/model 1", {"points": POINTS})
    assert [p.file for p in found] == ["frontier-org-model-1-wiki.svg", "frontier-org-model-1-emma.svg"]
    picture = found[0]
    assert "ours, int4, dense" in picture.alt
    svg = picture.draw()
    assert svg == picture.draw() and b">ours, int4<" in svg and b">.6<" in svg
    assert picture.markdown("images") == f"![{picture.alt}](images/{picture.file})"


def test_a_result_that_was_just_measured_has_tuples() -> None:
    (picture,) = pictures("growth", "m", {"series": ({"name": "a", "x": (0.9, 0.8), "y": (0.1, 0.2)},)})
    assert b">a<" in picture.draw()


def test_recipes_of_one_score_family_are_represented_by_the_best() -> None:
    series = recipe_series([f for f in RECIPES if f["text"] == "wiki"])
    assert [(s.name, s.role) for s in series] == [
        ("svd-llm", "baseline"), ("flra-b", "baseline"), ("spectrum", "ours")
    ]  # fmt: skip
    assert series[0].x == (0.9, 0.8) and series[0].y == (0.8, 1.2)


def test_recipes_have_a_picture_a_text() -> None:
    found = pictures("recipes", "m", {"figures": RECIPES})
    assert [p.file for p in found] == ["recipes-m-wiki.svg", "recipes-m-emma.svg"]
    assert b">flra-b<" in found[0].draw() and b">flra-b<" not in found[1].draw()


def test_one_keep_makes_no_line() -> None:
    assert pictures("recipes", "m", {"figures": [recipe("a", 0.8, 1.0), recipe("b", 0.8, 0.5)]}) == ()


def test_healing_from_the_curve_that_heal_writes() -> None:
    curve = [
        {"step": 0, "minutes": 0.0, "train": [], "validation": [0.5, 0.9]},
        {"step": 9, "minutes": 4.5, "train": [0.4], "validation": [0.25, 0.5]},
    ]
    (picture,) = pictures("healing", "m", {"curve": curve})
    assert "stage 0 from 0.500 to 0.250 nats, stage 1 from 0.900 to 0.500 nats" in picture.alt
    assert b">stage 1<" in picture.draw()


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("frontier", {"points": [{"series": "a", "text": "wiki"}]}),
        ("frontier", {"points": [{**POINTS[0], "role": "theirs"}]}),
        ("frontier", {"points": 3}),
        ("frontier", {}),
        ("growth", {"series": [{"name": "a", "x": [1.0]}]}),
        ("growth", {"series": [{"name": "a", "x": [1.0], "y": [1.0], "z": 1}]}),
        ("growth", {"series": 3}),
        ("growth", {"series": [[]]}),
        ("healing", {"curve": [{"minutes": 1}]}),
        ("recipes", {}),
        ("recipes", {"figures": [{"text": "a"}]}),
    ],
)
def test_results_in_another_form(section: str, value: Mapping[str, Any]) -> None:
    with pytest.raises(FormatError):
        pictures(section, "m", value)


@pytest.mark.parametrize("section", ["demo", "formats", "healing", "growth"])
def test_nothing_to_draw(section: str) -> None:
    assert pictures(section, "m", {}) == ()


def test_alt_text_cannot_end_the_link() -> None:
    (picture,) = pictures("growth", "a](http://x)[b\nc", {"series": [{"name": "a", "x": [0.9], "y": [0.1]}]})
    assert not set("[]\n") & set(picture.alt) and picture.file == "growth-a-http-x-b-c.svg"


def test_a_picture_that_is_the_same_is_not_written_again(tmp_path: Path) -> None:
    found = pictures("frontier", "m", {"points": POINTS})
    write_pictures(found, tmp_path / "images")
    path = tmp_path / "images" / "frontier-m-wiki.svg"
    before = path.stat().st_mtime_ns
    write_pictures(found, tmp_path / "images")
    assert path.stat().st_mtime_ns == before


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that has nothing but a frontier."""
    monkeypatch.setattr(report, "SECTIONS", {"frontier": ("Frontier", lambda value: "a table")})


@pytest.mark.usefixtures("sections")
def test_the_page_shows_the_pictures(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    report.save(path, "frontier", "m", {"points": POINTS})
    page = path.with_suffix(".md").read_text()
    assert page == report.page(json.loads(path.read_text())) and "a table\n\n![Perplexity" in page
    assert (tmp_path / "images" / "frontier-m-wiki.svg").read_bytes().startswith(b"<svg")


@pytest.mark.usefixtures("sections")
def test_without_matplotlib_results_are_saved_and_earlier_pictures_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "benchmarks.json"
    report.save(path, "frontier", "m", {"points": POINTS})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        report.save(path, "frontier", "other", {"points": POINTS})
    page = path.with_suffix(".md").read_text()
    assert set(json.loads(path.read_text())["frontier"]) == {"m", "other"}
    assert "images/frontier-m-wiki.svg" in page and "images/frontier-other-wiki.svg" not in page
    assert "pip install 'flrc-edge[report]'" in caplog.text
