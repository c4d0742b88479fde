"""``flrc-edge compare``: tables, JSON, the saved page, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group

SMALL = ("--tokens", 2816, "--window", 256, "--rank-step", 8, "--windows", 2, "--text", "austen-heldout")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def test_table_json_and_page(stories: Path, tmp_path: Path) -> None:
    save = tmp_path / "docs" / "b.json"
    done = run("-q", "compare", stories, "--keep", ".9,.7", "--save", save, *SMALL)
    assert done.exit_code == 0 and done.stderr == ""
    assert "| keep | factors | uniform | fisher | spectrum | stored |" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| 0.9", "| 0.7"))]
    assert len(rows) == 4 and all(row.count("**") >= 2 for row in rows)
    page = save.with_suffix(".md").read_text()
    assert all(row in page for row in rows) and "equal parameters: stories260k" in page
    again = run("-q", "compare", stories, "--keep", ".8", "--allocator", "fisher", "--json", *SMALL)
    result = json.loads(again.stdout)
    kinds = [(f["allocator"], f["factorization"], f["keep"]) for f in result["figures"]]
    assert kinds == [("fisher", "two-sided", 0.8), ("fisher", "one-sided", 0.8)]
    assert json.loads(save.read_text())["allocators"]["stories260k"]["figures"] != result["figures"]


def test_one_sided_is_measured_once(stories: Path) -> None:
    done = run(
        "-q", "compare", stories, "--keep", ".8", "--allocator", "uniform", "--factorization", "one-sided",
        "--json", *SMALL,
    )  # fmt: skip
    assert [f["factorization"] for f in json.loads(done.stdout)["figures"]] == ["one-sided"]


def test_formats(stories: Path) -> None:
    done = run("-q", "compare", stories, "--formats", "--text", "austen-heldout", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert next((f["dtype"], f["head"]) for f in result["formats"]) == ("fp32", "fp32")
    assert len(result["formats"]) == 4 and result["tokens"] == 4 * 512


def test_a_result_is_shown_even_if_it_cannot_be_saved(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("[]")
    done = run("-q", "compare", stories, "--keep", ".8", "--save", tmp_path / "b.json", *SMALL)
    assert done.exit_code == 3 and "| keep | factors |" in done.stdout
    assert "is not a JSON object" in done.stderr and (tmp_path / "b.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--keep", "1.1"), 2, "keep must lie in (0, 1], not 1.1"),
        (("--keep", "0"), 2, "keep must lie in (0, 1], not 0"),
        (("--keep", "abc"), 2, "is not a list of numbers"),
        (("--keep", ".8,nan"), 2, "keep must lie in (0, 1], not nan"),
        (("--keep", ".01"), 2, "keep 0.01 is below"),
        (("--allocator", "best"), 2, "Invalid value for '--allocator'"),
        (("--text", "nowhere"), 2, "there is no text 'nowhere'"),
        (("--windows", "0"), 2, "number of windows must be at least 1"),
        (("--windows", "100000"), 2, "tokens, "),
        (("--calibration", "nowhere"), 2, "there is no text 'nowhere'"),
        (("--tokens", "9"), 2, "do not fill one window"),
        (("--rank-step", "0"), 2, "rank_step must be at least 1"),
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
