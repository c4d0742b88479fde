"""``flrc-edge eval``: tables, JSON, the saved page, and a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge import report
from flrc_edge.cli import group

SMALL = ("--windows", 2, "--window", 32, "--resamples", 100)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogue.jsonl"
    row = {"fname": "1", "dialogue": "#Person1#: Hello Tom.", "summary": "Person1 greets Tom."}
    path.write_text(json.dumps(row))
    return path


def test_tables_and_page(compressed_stories: Any, stories: Path, dialogue: Path, tmp_path: Path) -> None:
    save = tmp_path / "docs" / "b.json"
    done = run(
        "-q", "eval", compressed_stories.checkpoint, "--dense", stories, *SMALL, "--summarize", dialogue,
        "--split", "all", "--max-tokens", 6, "--save", save,
    )  # fmt: skip
    assert done.exit_code == 0 and done.stderr == ""
    out = done.stdout
    assert "Dense reference: stories260k (model, float32)" in out and "100 resamples" in out
    for text in ("**wikitext2-heldout**: 62 tokens", "**austen-heldout**: 62 tokens"):
        assert text in out
    assert "|  | keep | perplexity | bits/byte | KL (nats) | KL p99 | same top token |" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| static:2 |")]
    assert len(rows) == 4 and "[" in rows[0][2]  # two texts; one file, figures and differences
    assert "BERTScore not measured" in out and "Minus the control `static:" in out
    assert "| reversed |" in out and "| R-L to dense |" in out
    page = save.with_suffix(".md").read_text()
    assert "## Evaluation: stories260k, checkpoint" in page and rows[0][2] in page
    content = json.loads(save.read_text())
    assert (
        page == report.page(content)
        and content["evaluation"]["stories260k, checkpoint"]["kind"] == "checkpoint"
    )


def test_json_of_a_bundle_without_a_dense_model(stories_bundle: Path) -> None:
    done = run(
        "-q", "eval", stories_bundle, *SMALL, "--text", "austen-heldout", "--policy", "static:1", "--json"
    )
    result = json.loads(done.stdout)
    assert result["dense"] is None and result["summaries"] == [] and len(result["kept"]) == 3
    (text,) = result["texts"]
    assert [f["stage"] for f in text["figures"]] == ["static:1"]
    assert set(text["figures"][0]["estimates"]) == {"perplexity", "bits_per_byte"}
    table = run("-q", "eval", stories_bundle, *SMALL, "--text", "austen-heldout").stdout
    assert "No dense reference" in table and "| – | – | – |" in table


def test_all_windows_and_no_text(compressed_stories: Any, dialogue: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a little red ball. " * 12)
    ck = compressed_stories.checkpoint
    fast = ("--window", 32, "--policy", "static:0", "--resamples", 100, "--json")
    done = run("-q", "eval", ck, "--text", short, "--windows", 0, "--stride", 16, *fast)
    (text,) = json.loads(done.stdout)["texts"]
    assert text["windows"] > 5 and text["stride"] == 16 and text["tokens"] == 31 + 16 * (text["windows"] - 1)
    done = run(
        "-q", "eval", ck, "--no-text", "--summarize", dialogue, "--split", "all", "--max-tokens", 3, *fast
    )
    result = json.loads(done.stdout)
    assert (
        result["texts"] == [] and result["summaries"][0]["policies"][0]["estimates"]["tokens"]["value"] == 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "static:9"), "the policy 'static:9' names stage 9: there are stages 0 to 2"),
        (("--policy", "progressive"), "there is no policy 'progressive'"),
        (("--policy", "dense"), "the policy 'dense' needs the dense model"),
        (("--text", "nothing.txt"), "there is no text 'nothing.txt'"),
        (("--windows", -1), "the number of windows must be at least 1, not -1"),
        (("--windows", 100000), "tokens, 3100000 are needed"),
        (("--stride", 33), "the stride must lie between 1 and the window of 32, not 33"),
        (("--no-text",), "there is nothing to measure"),
        (("--summarize", "none.csv"), "the summarization file none.csv cannot be read"),
        (("--dense", "none"), "there is no model 'none'"),
        (("--resamples", 1), "an interval needs at least 100 resamples, not 1"),
        (("--bertscore", "none"), "none holds no encoder for BERTScore"),
    ],
)
def test_mistakes(compressed_stories: Any, arguments: tuple[object, ...], message: str) -> None:
    done = run("eval", compressed_stories.checkpoint, "--windows", 1, "--window", 32, *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\x00\x01\x02", "looks binary"),
        ("a.txt", b"\xe4\xf6\xfc", "is not UTF-8"),
        ("a.txt", b"Too short.", "tokens, 31 are needed"),
        ("a.jsonl", b'{"fname": "1", "dialogue": "x"}', "row 1 of {} has no text in the field 'summary'"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"id,article\n1,x\n", "row 1 of {} has no text in the field 'highlights'"),
    ],
)
def test_bad_files(compressed_stories: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    option = "--text" if name.endswith(".txt") else "--summarize"
    done = run(
        "eval", compressed_stories.checkpoint, "--windows", 1, "--window", 32, option, path, "--split", "all"
    )
    assert done.exit_code == 2 and done.stdout == ""
    assert message.format(path) in done.stderr and "Traceback" not in done.stderr


def test_different_models_and_a_compressed_reference(
    compressed_stories: Any, stories_bundle: Path, family_model: Any
) -> None:
    ck = compressed_stories.checkpoint
    done = run("eval", ck, "--dense", family_model("qwen2"), *SMALL)
    assert done.exit_code == 2 and "they are of different models" in done.stderr
    done = run("eval", ck, "--dense", stories_bundle, *SMALL)
    assert done.exit_code == 2 and "the bundle given as dense is compressed" in done.stderr


def test_a_target_that_is_not_there() -> None:
    done = run("eval", "no-such-model")
    assert done.exit_code == 2 and "there is no model 'no-such-model'" in done.stderr
