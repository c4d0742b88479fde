"""``flrc-edge compare``: tables, JSON, the saved page, and its mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import flrc_edge
from flrc_edge.cli import group
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.texts import WeightedText, token_windows

SMALL = ("--tokens", 2816, "--window", 256, "--rank-step", 8, "--windows", 2, "--text", "austen-heldout")
TWO = ("--recipe", "svd-llm", "--recipe", "spectrum-two-sided")
FAST = ("--asvd-samples", 1, "--asvd-window", 32)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def test_table_json_and_page(stories: Path, tmp_path: Path) -> None:
    save = tmp_path / "docs" / "b.json"
    done = run("-q", "compare", stories, "--keep", ".9,.7", "--save", save, *TWO, *SMALL)
    assert done.exit_code == 0 and done.stderr == ""
    assert (
        "| keep | recipe | factors | ranks | storage | austen-heldout | g | ÷ | stored | dense |"
        in done.stdout
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| 0.9", "| 0.7"))]
    assert len(rows) == 4 and sum("**" in row for row in rows) == 2 and "| 1.00 |" in rows[2]
    assert "Rank search" not in done.stdout
    page = save.with_suffix(".md").read_text()
    assert all(row in page for row in rows) and "equal parameters: stories260k" in page
    again = run("-q", "compare", stories, "--keep", ".8", "--recipe", "flra-gw2", "--json", *SMALL)
    result = json.loads(again.stdout)
    assert [(f["recipe"], f["factorization"], f["keep"]) for f in result["figures"]] == [
        ("flra-gw2", "one-sided", 0.8)
    ]
    assert json.loads(save.read_text())["recipes"]["stories260k"]["figures"] != result["figures"]


def test_a_checkpoint_beside_the_recipes(compressed_stories: Any, tmp_path: Path) -> None:
    folder, source = compressed_stories.checkpoint, compressed_stories.source
    done = run(
        "-q", "compare", source.path, "--keep", ".9", "--recipe", "svd-llm", "--checkpoint", folder, "--json", *SMALL
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    reference, ours = json.loads(done.stdout)["figures"]
    plan = compressed_stories.manifest.plan
    assert (ours["recipe"], ours["ranks"], ours["keep"]) == (folder.name, "measured", 0.9)
    assert ours["kept"] == round(plan.kept(0), 5)
    assert ours["ratio"] == pytest.approx(ours["growth"] / reference["growth"], rel=0.01)
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=2, length=256).ids
    expected = perplexity(torch_logits(flrc_edge.load(folder)), ids)
    assert ours["perplexity"] == pytest.approx(expected, abs=1e-3)


def test_a_checkpoint_of_another_model_is_refused(
    compressed_stories: Any, family_model: Callable[[str], Path]
) -> None:
    done = run("compare", family_model("llama"), "--checkpoint", compressed_stories.checkpoint, *SMALL)
    assert done.exit_code == 2 and "Traceback" not in done.stderr
    assert "was compressed from a model with" in done.stderr


def test_joint_factors(stories: Path, tmp_path: Path) -> None:
    save = tmp_path / "b.json"
    done = run("-q", "compare", stories, "--joint", "--keep", ".9,.7", "--save", save, *SMALL)
    assert done.exit_code == 0, done.output
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| p")]
    assert [(r[0].strip(), r[1].strip()) for r in rows] == [
        (s, k) for s in ("plain", "pivoted") for k in ("0.9", "0.7")
    ]
    assert "Joint factors: stories260k" in save.with_suffix(".md").read_text()
    refused = run("compare", stories, "--joint", "--frontier")
    assert refused.exit_code == 2 and "ask for one of them" in refused.stderr


def test_frontier(stories: Path, tmp_path: Path) -> None:
    save = tmp_path / "b.json"
    done = run(
        "-q", "compare", stories, "--frontier", "--keep", ".8", "--bits", "7,5",
        "--save", save, *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    points = json.loads(save.read_text())["frontier"]["stories260k"]["points"]
    series = {p["series"] for p in points}
    assert series == {
        "dense, nearest", "dense, compensated", "svd-llm, int4 nearest", "flra-gw2, int4 nearest",
        "ours, int8", "ours, int4", "ours, int4 nearest", "ours, mixed",
    }  # fmt: skip
    growth = {(p["series"], p["label"]): p["growth"] for p in points}
    assert growth["dense, compensated", "int4/32"] < growth["dense, nearest", "int4/32"]
    assert (
        growth["ours, int4", "0.8"]
        < growth["ours, int4 nearest", "0.8"]
        < growth["svd-llm, int4 nearest", "0.8"]
    )
    mixed = {p["label"]: p for p in points if p["series"] == "ours, mixed"}
    assert 6.8 < mixed["7 bit"]["bits"] <= 7 and 4.8 < mixed["5 bit"]["bits"] <= 5
    assert "Quality against bytes: stories260k" in save.with_suffix(".md").read_text()
    assert (tmp_path / "images" / "frontier-stories260k-austen-heldout.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frontier", "--formats"), "different comparisons"),
        (("--frontier", "--bits", "4,x"), "list of numbers"),
        (("--frontier", "--bits", "0"), "--bits must lie between"),
        (("--frontier", "--storage", "both"), "--frontier takes one storage"),
    ],
)
def test_frontier_mistakes(stories: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("compare", stories, *arguments)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_asvd_two_texts_and_both_storages(stories: Path) -> None:
    done = run(
        "-q", "compare", stories, "--keep", ".8", "--recipe", "asvd", "--recipe", "flra-gw2", "--storage", "both",
        *SMALL, "--text", "wikitext2-heldout", *FAST,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "| austen-heldout | g | ÷ | wikitext2-heldout | g | ÷ |" in done.stdout
    rows = [line.split(" | ")[1] for line in done.stdout.splitlines() if line.startswith("| 0.8")]
    assert rows == ["asvd", "flra-gw2", "asvd-pivoted", "flra-gw2-pivoted"]
    assert "| – |" in done.stdout  # no svd-llm to divide by
    search = done.stdout.partition("Rank search")[2]
    assert "| asvd | channel means" in search and "| asvd, pivoted | channel means" in search
    assert "| fisher | the ranks alone, all else given | – |" in search


def test_all_recipes_and_two_texts_are_the_default(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flrc_edge import compare as module
    from flrc_edge.errors import UsageError

    def stop(*_: object, **options: object) -> None:
        raise UsageError(f"{[r.name for r in options['recipes']]} {options['texts']}")  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "compare", stop)
    done = run("compare", stories)
    assert done.stderr.count("flra-") == 6 and "'svd', 'asvd', 'svd-llm'" in done.stderr
    assert "('wikitext2-heldout', 'austen-heldout')" in done.stderr
    pivoted = run("compare", stories, "--storage", "pivoted", *TWO)
    assert "['svd-llm-pivoted', 'spectrum-two-sided-pivoted']" in pivoted.stderr


def test_formats(stories: Path) -> None:
    done = run("-q", "compare", stories, "--formats", "--text", "austen-heldout", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert next((f["dtype"], f["head"]) for f in result["formats"]) == ("fp32", "fp32")
    assert len(result["formats"]) == 7 and result["tokens"] == 4 * 512


def test_a_result_is_shown_even_if_it_cannot_be_saved(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("[]")
    done = run("-q", "compare", stories, "--keep", ".8", "--save", tmp_path / "b.json", *TWO, *SMALL)
    assert done.exit_code == 3 and "| keep | recipe |" in done.stdout
    assert "is not a JSON object" in done.stderr and (tmp_path / "b.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--keep", "1.1"), 2, "keep must lie in (0, 1], not 1.1"),
        (("--keep", "0"), 2, "keep must lie in (0, 1], not 0"),
        (("--keep", "abc"), 2, "is not a list of numbers"),
        (("--keep", ".8,nan"), 2, "keep must lie in (0, 1], not nan"),
        (("--keep", ".01"), 2, "keep 0.01 is below"),
        (("--keep", ".05", "--rank-step", "1"), 2, "the least that ASVD's truncations leave"),
        (("--recipe", "best"), 2, "Invalid value for '--recipe'"),
        (("--storage", "dense"), 2, "Invalid value for '--storage'"),
        (("--text", "nowhere"), 2, "there is no text 'nowhere'"),
        (("--text", "austen-heldout"), 2, "the text austen-heldout is named twice"),
        (("--windows", "0"), 2, "number of windows must be at least 1"),
        (("--windows", "100000"), 2, "tokens, "),
        (("--asvd-samples", "0"), 2, "the search's samples must be at least 1, not 0"),
        (("--asvd-window", "1"), 2, "the search's window must be at least 2, not 1"),
        (("--formats", "--text", "wikitext2-heldout"), 2, "--formats takes one --text"),
        (("--calibration", "nowhere"), 2, "there is no text 'nowhere'"),
        (("--tokens", "9"), 2, "do not fill one window"),
        (("--rank-step", "0"), 2, "rank_step must be at least 1"),
        (("--factorization", "one-sided"), 2, "No such option"),
    ],
)
def test_mistakes(stories: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run("-q", "compare", stories, *SMALL, *arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code and message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_unknown_models(stories: Path) -> None:
    done = run("compare", "no-such-model")
    assert done.exit_code == 2 and "there is no model 'no-such-model'" in done.stderr
