"""``flrc-edge compare``: tables, JSON, the saved page, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group

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
    assert len(result["formats"]) == 4 and result["tokens"] == 4 * 512


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
