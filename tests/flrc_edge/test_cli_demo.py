"""``flrc-edge demo`` on stories260k: the summary, the streamed answers, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge import demo as module
from flrc_edge.cli import group
from flrc_runtime import load, manifest

PROMPT = "Once upon a time"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One run: two stages whose boundary lies inside the answer."""
    stories = Path(__file__).parents[1] / "data" / "stories260k"
    output = tmp_path_factory.mktemp("demo") / "out"
    done = run(
        "-q", "demo", "-o", output, "--model", stories, "--stages", ".95,.9,.85", "--tokens", 4096,
        "--dtype", "int8", "--prompt", PROMPT, "--max-tokens", 100, "--save", output.parent / "b.json",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    return output, done


def test_summary(demo: tuple[Path, Result]) -> None:
    """The fields of the issue with their own fields exactly, and four more that the report needs."""
    output, _ = demo
    summary = json.loads((output / "summary.json").read_text())
    asked = {"model", "keep", "stages", "dense", "bundle_bytes", "answer", "stage_of_token"}
    assert set(summary) == asked | {"dtype", "prompt", "dense_answer", "seconds", "machine"}
    assert all(set(s) == {"keep", "ppl", "ms_per_token", "bytes"} for s in summary["stages"])
    assert set(summary["dense"]) == {"ppl", "ms_per_token", "bytes"}
    assert summary["model"] == "stories260k" and summary["keep"] == [0.95, 0.9, 0.85]
    plan = manifest.verify(output / "checkpoint").plan
    assert [s["keep"] for s in summary["stages"]] == [round(plan.kept(i), 5) for i in range(3)]
    assert summary["bundle_bytes"] == sum(p.stat().st_size for p in (output / "bundle").iterdir())
    sizes = [summary["dense"]["bytes"], *(s["bytes"] for s in summary["stages"])]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert all(f["ms_per_token"] > 0 and f["ppl"] > 1 for f in [summary["dense"], *summary["stages"]])


def test_the_answer_is_the_bundles_own(demo: tuple[Path, Result]) -> None:
    output, _ = demo
    summary = json.loads((output / "summary.json").read_text())
    model = load(output / "bundle")
    tokens = list(model.stream(PROMPT, max_tokens=100))
    assert summary["answer"] == "".join(t.text for t in tokens)
    assert summary["stage_of_token"] == [t.stage for t in tokens]
    schedule = model.manifest.schedule
    assert summary["stage_of_token"] == [schedule.stage_at(i) for i in range(len(tokens))]
    assert len(set(summary["stage_of_token"])) > 1  # it visibly moves
    assert summary["dense_answer"].startswith(", there was a little girl named")


def test_what_the_user_sees(demo: tuple[Path, Result]) -> None:
    output, done = demo
    summary = json.loads((output / "summary.json").read_text())
    assert done.stderr == ""
    assert f"> {PROMPT}" in done.stdout and f"dense: {summary['dense_answer']}" in done.stdout
    assert "stages: [0]" in done.stdout
    assert done.stdout.count("[1]") == (1 in summary["stage_of_token"])
    assert "perplexity" in done.stdout and str(output / "summary.json") in done.stdout
    page = (output.parent / "b.md").read_text()
    assert "The demo: stories260k" in page and PROMPT in page


def test_nothing_else_is_left(demo: tuple[Path, Result]) -> None:
    output, _ = demo
    assert {p.name for p in output.iterdir()} == {"checkpoint", "bundle", "summary.json"}
    manifest.verify(output / "bundle")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--stages", "2"), 2, "keep must lie in (0, 1], not 2"),
        (("--stages", ".8,.9"), 2, "the keep of each stage must be below the one before"),
        (("--stages", "x"), 2, "is not a list of numbers"),
        (("--stages", ".1"), 2, "keep 0.1 is below"),
        (("--tokens", "10"), 2, "do not fill one window"),
        (("--prompt", " "), 2, "the prompt is empty"),
        (("--prompt", "ball " * 600), 2, "leaves no room for an answer in a context of 512"),
        (("--max-tokens", "0"), 2, "Invalid value for '--max-tokens'"),
        (("--dtype", "int3"), 2, "Invalid value for '--dtype'"),
        (("--model", "no-such-model"), 2, "there is no model 'no-such-model'"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_mistakes_cost_no_earlier_demo(
    stories: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str, overwrite: bool
) -> None:
    output = tmp_path / "out"
    extra: tuple[str, ...] = ()
    if overwrite:
        (output / "checkpoint").mkdir(parents=True)
        (output / "checkpoint" / "x").write_text("earlier")
        (output / "checkpoint" / "flrc.json").write_text('{"files": {"x": {}}}')
        (output / "summary.json").write_text("earlier")
        extra = ("--overwrite",)
    done = run("-q", "demo", "-o", output, "--model", stories, *extra, *arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code and message in done.stderr and "Traceback" not in done.stderr
    if overwrite:
        assert (output / "checkpoint" / "x").read_text() == (output / "summary.json").read_text() == "earlier"
    else:
        assert not output.exists() or not list(output.iterdir())


def test_an_output_that_is_not_a_demo(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = run("demo", "-o", tmp_path, "--model", stories)
    assert done.exit_code == 2 and "exists already" in done.stderr
    done = run("demo", "-o", tmp_path, "--model", stories, "--overwrite")
    assert done.exit_code == 2 and "holds thesis.txt, which no demo wrote" in done.stderr
    done = run("demo", "-o", tmp_path / "thesis.txt", "--model", stories)
    assert done.exit_code == 2 and "is not a folder" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_unsupported_family(copied_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied_model("llama", model_type="gpt2", architectures=None)
    done = run("demo", "-o", tmp_path / "out", "--model", folder)
    assert done.exit_code == 1 and "model_type 'gpt2' is not supported" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failure_in_the_middle(
    compressed_stories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was whole stays, what was not is gone, and no summary claims otherwise."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "bench", stop)
    with pytest.raises(KeyboardInterrupt):
        module.run(
            compressed_stories.source,
            tmp_path,
            compressed_stories.settings,
            dtype="fp32",
            windows=2,
            window=64,
        )
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint", "bundle"}
    written = manifest.verify(tmp_path / "bundle").plan.by_name()
    planned = compressed_stories.manifest.plan.by_name()
    assert {n: p.ranks for n, p in written.items()} == {n: p.ranks for n, p in planned.items()}
