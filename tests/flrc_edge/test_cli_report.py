"""``flrc-edge report``: one page that holds everything, and one sentence for what cannot be drawn."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import flrc_runtime
from flrc_edge.cli import group
from flrc_edge.figures import rank_map
from flrc_edge.html_report import Piece, Table, html_page
from flrc_edge.loss_curves import POINTS, read_curves
from flrc_edge.rank_report import rank_report
from flrc_edge.stage_report import Measured, MeasuredAnswer, measured_parts
from flrc_runtime import manifest

STORIES = Path(__file__).parents[1] / "data" / "stories260k"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


class Page(HTMLParser):
    """Tags with their attributes, the text, and the cells of every table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of the three-stage checkpoint."""
    path = tmp_path_factory.mktemp("report") / "new" / "page.html"
    done = run("report", compressed_stories.checkpoint, "-o", path)
    assert done.exit_code == 0 and done.stdout.startswith(f"{path} (") and "Drawing: 5/5" in done.stderr
    text = path.read_text("utf-8")
    return text, Page(text)


def test_the_page_is_whole_and_closed(page: tuple[str, Page]) -> None:
    assert page[0].startswith("<!doctype html>") and page[1].open == []
    assert len(page[1].all("figure")) == len(page[1].all("img")) == 5


def test_every_picture_is_inline_and_described(page: tuple[str, Page]) -> None:
    for img in page[1].all("img"):
        assert img["alt"] and len(img["alt"]) > 30
        kind, _, data = (img["src"] or "").partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data, validate=True).decode()
        assert svg.startswith("<svg") and "prefers-color-scheme:dark" in svg


def test_nothing_is_loaded(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    policy = next(
        m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text


def test_the_tables_hold_the_plan(page: tuple[str, Page], compressed_stories: Any) -> None:
    content = manifest.read(compressed_stories.checkpoint)
    ranks = rank_map(content.plan)
    overview, score, _, losses, *rest = page[1].tables
    assert [row[0] for row in overview] == ["stage", "0", "1", "2"]
    assert [row[3] for row in overview[1:]] == [f"{content.plan.activated(s):,}" for s in range(3)]
    assert score[0] == ["layer", "q", "k", "v", "o", "gate", "up", "down"]
    assert len(score) == 1 + content.model.num_layers
    for row, values in zip(score[1:], ranks.scores.T, strict=True):
        assert [float(cell.replace(",", "")) for cell in row[1:]] == pytest.approx(values, rel=6e-3)
    curves = read_curves(compressed_stories.checkpoint)
    assert curves.source == "measured"
    for i, row in enumerate(losses[1:]):
        for k, cell in enumerate(row[1:]):
            p = ranks.projections[k][i]
            assert p is not None
            curve = curves.projections[p.name]
            loss, rank = cell.split(" at ")
            assert float(loss) == pytest.approx(curve.losses[curve.ranks.index(int(rank))], rel=6e-3)
    for stage, table in enumerate(rest[:3]):
        for i, row in enumerate(table[1:]):
            for k, cell in enumerate(row[1:]):
                p = ranks.projections[k][i]
                assert p is not None
                share = p.parameters(stage) / (p.shape[0] * p.shape[1])
                assert cell == ("dense" if p.dense else f"{p.ranks[stage]} ({share:.2f})")
    kept, divergence = rest[3:]
    assert kept[-1] == ["all", *(f"{content.plan.kept(s):.3f}" for s in range(3))]
    assert [row[1:] for row in divergence[1:]] == [
        [f"{v:.4f}" for v in column] for column in zip(*content.schedule.divergence, strict=True)
    ]


def test_provenance(page: tuple[str, Page], compressed_stories: Any) -> None:
    content = compressed_stories.manifest
    assert content.calibration.fingerprint in page[0] and f"torch {content.versions['torch']}" in page[0]
    assert "stories260k" in page[0] and f"seed {content.calibration.seed}" in page[0]
    assert f"{sum(f.size for f in content.files.values()):,} bytes" in page[0]


def test_the_same_page_every_time(page: tuple[str, Page], compressed_stories: Any, tmp_path: Path) -> None:
    assert run("report", compressed_stories.checkpoint, "-o", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text("utf-8") == page[0]


def test_a_bundle_with_png_and_json(stories_bundle: Path, tmp_path: Path) -> None:
    done = run("report", stories_bundle, "-o", tmp_path / "r.html", "--png", tmp_path / "png", "--json")
    assert done.exit_code == 0
    names = ["importance", "ranks", "kept-by-stage", "divergence"]
    assert json.loads(done.stdout) == {
        "html": str(tmp_path / "r.html"),
        "png": [str(tmp_path / "png" / f"{name}.png") for name in names],
    }
    for name in names:
        assert (tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "MB read a token" in (tmp_path / "r.html").read_text("utf-8")
    assert run("verify", stories_bundle).exit_code == 0


def test_a_measured_bundle(stories_bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "r.html"
    options = ("--windows", 2, "--prompt", "Once upon a time", "--threads", 1)
    done = run("-q", "report", stories_bundle, "-o", place, "--measure", "--dense", STORIES, *options)
    assert done.exit_code == 0, done.output
    text = place.read_text("utf-8")
    parsed = Page(text)
    assert parsed.open == [] and "are not shown: flrc-edge report --measure" not in text
    model = flrc_runtime.load(stories_bundle)
    answer = flrc_runtime.generate(model, "Once upon a time", max_tokens=128)
    found = re.search(r'<p class="answer">(.*?)</p>', text, re.DOTALL)
    assert found is not None
    pieces = re.findall(
        r'<span class="stage-(.)"><sup title="stage .">(.)</sup>(.*?)</span>', found[1], re.DOTALL
    )
    assert html.unescape("".join(piece for _, _, piece in pieces)) == answer.text
    assert {int(number) for _, number, _ in pieces} == set(answer.stage_of_token)
    quality = [t for t in parsed.tables if t[0][:2] == ["stage", "keep"] and t[0][2] == "perplexity"]
    assert [len(t) for t in quality] == [1 + 4, 1 + 4]  # three stages and the dense model, two texts
    evaluated = json.loads(run("eval", stories_bundle, "--dense", STORIES, "--windows", 2, "--json").stdout)
    for table, expected in zip(quality, evaluated["texts"], strict=True):
        for row, figures in zip(table[1:], expected["figures"], strict=True):
            assert row[2].startswith(f"{figures['estimates']['perplexity']['value']:.4g}")
    speed = next(t for t in parsed.tables if "tokens a second" in t[0])
    assert {row[0] for row in speed[1:]} == {"stage 0", "stage 1", "stage 2"}
    assert all(float(row[3]) > 0 for row in speed[1:])
    memory = [t for t in parsed.tables if "MB used" in t[0]]
    assert all(float(row[3].replace(",", "")) > 0 for t in memory for row in t[1:])
    assert memory or sys.platform != "linux"
    regions = [d for d in parsed.all("div") if d.get("class") == "scroll"]
    assert all(d.get("tabindex") == "0" and d.get("aria-label") for d in regions)


def test_a_measured_checkpoint(compressed_stories: Any, tmp_path: Path) -> None:
    done = run(
        "report", compressed_stories.checkpoint, "-o", tmp_path / "r.html", "--measure", "--windows", 1
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "How good the stages are" in text and "How fast" not in text
    assert "a checkpoint has no graphs, its bundle does" in text


def test_a_report_needs_no_torch(compressed_stories: Any, tmp_path: Path) -> None:
    """What is not measured is drawn with ``flrc-edge[report]`` alone."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "from flrc_edge.cli import run\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    page = tmp_path / "r.html"
    arguments = ["report", str(compressed_stories.checkpoint), "-o", str(page)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "What every rank costs" in page.read_text("utf-8")


def test_answers_are_not_markup() -> None:
    answer = MeasuredAnswer("<b>", (Piece(0, "<script>x</script>"), Piece(5, "&amp;")), "stop", 1.0)
    figures = {
        "stage": "static:0",
        "keep": 1.0,
        "estimates": {"perplexity": {"value": 2.0, "low": None, "high": None}},
    }
    text = {"text": "t", "tokens": 1, "windows": 1, "window": 2, "figures": [figures]}
    parts = measured_parts(Measured({"texts": [text]}, None, (answer,)))
    page = html_page("t", "l", facts=(), summary=Table("c", ("a",), (("b",),)), sections=[parts[-1]])  # type: ignore[list-item]
    assert "<script>" not in page and "&lt;script&gt;" in page and "&amp;amp;" in page
    assert 'class="stage-1"><sup title="stage 5">5</sup>' in page


@pytest.mark.parametrize("option", [("--dense", "x"), ("--prompt", "x"), ("--threads", "1")])
def test_what_is_not_measured_is_refused(
    compressed_stories: Any, tmp_path: Path, option: tuple[str, str]
) -> None:
    done = run("report", compressed_stories.checkpoint, "-o", tmp_path / "r.html", *option)
    assert (done.exit_code, "add --measure" in done.stderr) == (2, True)
    done = run(
        "report", compressed_stories.checkpoint, "-o", tmp_path / "r.html", "--measure", "--prompt", "x"
    )
    assert (done.exit_code, "--prompt needs a bundle" in done.stderr) == (2, True)
    assert not (tmp_path / "r.html").exists()


def test_loss_curves_fall_and_are_short(compressed_stories: Any) -> None:
    content = manifest.read(compressed_stories.checkpoint)
    curves = read_curves(compressed_stories.checkpoint).projections
    assert set(curves) == {p.name for p in content.plan.projections}
    for curve in curves.values():
        assert len(curve.ranks) == len(curve.losses) <= POINTS
        assert list(curve.ranks) == sorted(set(curve.ranks))
        assert curve.losses[0] > curve.losses[-1]


def edited(source: Path, target: Path, **plan: Any) -> Path:
    """Copy a checkpoint with other fields in its plan, of one stage."""
    shutil.copytree(source, target)
    content = json.loads((target / "flrc.json").read_text())
    for p in content["plan"]["projections"]:
        p["ranks"] = p["ranks"][:1]
    content["plan"] |= {"keep": content["plan"]["keep"][:1]} | plan
    content["schedule"] = {"boundaries": [], "horizon": 0, "divergence": [], "block": 0}
    (target / "flrc.json").write_text(json.dumps(content))
    return target


def test_number_formats_that_differ_are_shown(compressed_stories: Any) -> None:
    content = manifest.read(compressed_stories.checkpoint)
    kinds = itertools.cycle(("int4/32", "int8/64"))
    projections = tuple(
        replace(p, formats=tuple(next(kinds) for _ in p.matrices())) for p in content.plan.projections
    )
    plan = replace(content.plan, projections=projections, embedding="int8/32")
    report = rank_report(replace(content, plan=plan))
    assert list(report.figures) == ["importance", "ranks", "bits", "kept-by-stage", "divergence"]
    formats = next(t for t in Page(report.html).tables if t[0][0] == "format")
    sizes = dict.fromkeys(("int4/32", "int8/64"), 0)
    for p in projections:
        for name, (rows, columns) in zip(p.formats, p.matrices().values(), strict=True):
            sizes[name] += rows * columns
    assert {row[0]: row[1] for row in formats[1:]} == {name: f"{size:,}" for name, size in sizes.items()}
    assert "embedding and head int8/32" in report.html


def test_one_stage_without_scores(compressed_stories: Any, tmp_path: Path) -> None:
    folder = edited(compressed_stories.checkpoint, tmp_path / "one", scores={})
    assert run("report", folder, "-o", tmp_path / "r.html").exit_code == 0
    text = (tmp_path / "r.html").read_text("utf-8")
    assert len(Page(text).all("img")) == 2 and "the manifest holds no Fisher scores" in text


def test_names_from_the_manifest_are_not_markup(compressed_stories: Any, tmp_path: Path) -> None:
    folder = edited(compressed_stories.checkpoint, tmp_path / "one", allocator="<script>x</script>")
    content = json.loads((folder / "flrc.json").read_text())
    content["model"]["name"] = '"><img src=http://x>'
    (folder / "flrc.json").write_text(json.dumps(content))
    assert run("report", folder, "-o", tmp_path / "r.html").exit_code == 0
    parsed = Page((tmp_path / "r.html").read_text("utf-8"))
    assert not parsed.all("script") and all((i["src"] or "").startswith("data:") for i in parsed.all("img"))


def test_numbers_that_cannot_be_drawn(compressed_stories: Any, tmp_path: Path) -> None:
    folder = edited(compressed_stories.checkpoint, tmp_path / "one")
    content = json.loads((folder / "flrc.json").read_text())
    content["schedule"] |= {"divergence": [[1.7e308, 1.0]], "block": 16}
    (folder / "flrc.json").write_text(json.dumps(content))
    done = run("report", folder, "-o", tmp_path / "r.html")
    assert done.exit_code == 3 and done.stderr.startswith(
        "Error: the manifest holds numbers that cannot be drawn"
    )
    assert not (tmp_path / "r.html").exists()


def test_damaged_or_no_folder(compressed_stories: Any, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(compressed_stories.checkpoint, torn)
    (torn / "flrc.json").write_bytes((torn / "flrc.json").read_bytes()[:-20])
    (tmp_path / "file").write_text("x")
    for path in (torn, tmp_path / "file", tmp_path / "nowhere", tmp_path):
        done = run("report", path, "-o", tmp_path / "out" / "r.html")
        assert done.exit_code == 3 and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_an_earlier_report_is_replaced_and_nothing_else(compressed_stories: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("my own page")
    done = run("report", compressed_stories.checkpoint, "-o", mine)
    assert done.exit_code == 2 and "is not a report" in done.stderr and mine.read_text() == "my own page"
    assert run("report", compressed_stories.checkpoint, "-o", tmp_path).exit_code == 2
    page = tmp_path / "r.html"
    page.write_text("<!doctype html>\n<!-- written by flrc-edge report -->\nold")
    assert (
        run("report", compressed_stories.checkpoint, "-o", page).exit_code == 0
        and "old" not in page.read_text()[:90]
    )


def test_the_folder_itself_is_not_spoiled(compressed_stories: Any, tmp_path: Path) -> None:
    folder = compressed_stories.checkpoint
    (tmp_path / "link").symlink_to(folder)
    before = sorted(p.name for p in folder.iterdir())
    for options in (["-o", folder / "r.html"], ["-o", tmp_path / "link" / "r.html"],
                    ["-o", tmp_path / "r.html", "--png", folder / "png"]):  # fmt: skip
        done = run("report", folder, *options)
        assert done.exit_code == 2 and "must not go into it" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before and not (tmp_path / "r.html").exists()


def test_a_place_that_cannot_be_written(compressed_stories: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = run("report", compressed_stories.checkpoint, "-o", tmp_path / "file" / "r.html")
    assert done.exit_code == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr


def test_without_matplotlib(compressed_stories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("report", compressed_stories.checkpoint, "-o", tmp_path / "r.html")
    assert done.exit_code == 1 and not (tmp_path / "r.html").exists()
    assert done.stderr.splitlines() == [
        "Error: figures need the package matplotlib, which is not installed",
        "Hint: pip install 'flrc-edge[report]'",
    ]
