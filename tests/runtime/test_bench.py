"""Speed and memory of a bundle: what is counted, what is compared, and peers that are not there."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from flrc_edge.cli import group
from flrc_runtime import FlrcError, Speculation, UsageError, load
from flrc_runtime.bench import bench, move_ms
from flrc_runtime.bench.bandwidth import memory_bandwidth
from flrc_runtime.bench.loading import loading
from flrc_runtime.bench.peers import Peer
from flrc_runtime.bench.subjects import bundle_subjects
from flrc_runtime.bundle import open_bundle

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def int8(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages in int8, their embedding tied to the head."""
    from flrc_exporters.bundle import export

    folder = tmp_path_factory.mktemp("bench") / "stories-int8"
    export(compressed_stories.checkpoint, folder, dtype="int8")
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(group, ["bench", *(str(a) for a in arguments)])


def test_rows_of_every_stage_and_length(bundle: Any) -> None:
    seen = []
    result = bench(
        [bundle.folder],
        baseline=bundle.folder,
        prompt_tokens=(24, 8),
        decode_tokens=4,
        repetitions=2,
        threads=1,
        progress=lambda *step: seen.append(step),
    )
    stages = ["0", "1", "schedule", "alternating"] * 2
    assert [(r.test, r.tokens, r.stage) for r in result.rows] == [
        (test, tokens, stage)
        for test, tokens in (("prompt", 8), ("prompt", 24), ("decode", 4))
        for stage in stages
    ]
    for row in result.rows:
        assert row.ms_per_token > 0 <= row.ms_spread and row.ratio is not None and row.ratio > 0
        assert row.tokens_per_second == pytest.approx(1e3 / row.ms_per_token)
        known = row.test == "decode" and row.stage in ("0", "1")
        assert (row.gb_per_second is not None) == known
        if row.gb_per_second is not None:
            size = open_bundle(bundle.folder).manifest.stages[int(row.stage)].bytes
            assert row.gb_per_second == pytest.approx(size * row.tokens_per_second / 1e9)
    references = [r for r in result.rows if r.stage == "0"][::2]
    assert [r.ratio for r in references] == [1, 1, 1]
    assert result.depth == 8 and result.bandwidth > 1e8 and not result.loading
    assert [*result.packing_seconds] == [bundle.folder.name]  # made once, for both
    assert move_ms(result, bundle.folder.name) is not None
    assert seen == [("Measuring", i, 3) for i in (1, 2, 3)]


def test_memory_bandwidth_is_that_of_reading() -> None:
    assert 1e9 < memory_bandwidth(1, repetitions=1) < 1e12


def test_speculation_makes_the_tokens_it_counts(bundle: Any) -> None:
    opened, model = open_bundle(bundle.folder), load(bundle.folder, threads=1)
    ids = model.tokenizer.encode(TEXT)[:20]
    speculative = bundle_subjects(opened, model, speculation=Speculation(adaptive=False, most=3))[-1]
    spent = speculative.measure(ids, 30)
    assert spent.accepted is not None and 0.3 < spent.accepted <= 1  # stage 1 is nearly the same model
    assert spent.prompt > 0 < spent.decode
    result = bench(
        [bundle.folder],
        prompt_tokens=(20,),
        decode_tokens=8,
        repetitions=1,
        threads=1,
        text=TEXT,
        speculation=Speculation(adaptive=False),
    )
    row = result.rows[-1]
    assert row.stage == "speculative" and row.test == "decode" and row.accepted is not None
    assert all(r.accepted is None for r in result.rows[:-1])


@pytest.mark.parametrize("packed", [True, False])
def test_loading(bundle: Any, packed: bool) -> None:
    if packed:
        load(bundle.folder, stages=())
    all_stages = loading(bundle.folder, stages=None, pack=packed, threads=1, repetitions=1)
    assert all_stages.stages == 2 and all_stages.packed == packed and all_stages.seconds > 0
    assert (
        all_stages.file_bytes
        == sum(p.stat().st_size for p in bundle.folder.iterdir() if p.name != "README.md")
        - (bundle.folder / "flrc.json").stat().st_size
    )
    assert (all_stages.cache_bytes is not None) == packed
    if Path("/proc/self/smaps_rollup").exists():
        assert all_stages.loaded_bytes and all_stages.used_bytes and all_stages.private_bytes
        assert 0 < all_stages.loaded_bytes <= all_stages.used_bytes < 1e9


def test_every_way_of_loading_is_in_the_table(bundle: Any) -> None:
    done = run(bundle.folder, "-p", 8, "-n", 2, "-r", 1, "--threads", 1, "--loading", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["loading"]
    assert [(r["stages"], r["packed"]) for r in rows] == [(2, True), (1, True), (2, False), (1, False)]


@pytest.mark.parametrize("form", ["md", "csv"])
def test_forms(bundle: Any, form: str) -> None:
    done = run(
        bundle.folder, "-p", "8,16", "-n", 4, "-r", 1, "--threads", 1, "--loading", "--baseline", bundle.folder,
        "--format", form,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert len(rows) == 24 and rows[0]["test"] == "prompt" and rows[0]["ratio"] == "1.0"
    else:
        assert "| stories | schedule |  | decode 4 |" in done.stdout and "| GB/s | ratio |" in done.stdout
        assert "| stories | 2 | packed |" in done.stdout and "| stories | 1 | as exported |" in done.stdout
        assert "moving to another stage costs" in done.stdout and "GB/s" in done.stdout.splitlines()[-1]


def test_operators_of_a_step_are_those_of_the_graph(bundle: Any, int8: Path, tmp_path: Path) -> None:
    page = tmp_path / "figures.json"
    done = run(int8, "-p", 8, "-n", 2, "-r", 1, "--threads", 1, "--operators", "--save", page)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(page.read_text())["speed"]["stories260k"]["operators"]
    assert [r["stage"] for r in rows] == sorted(r["stage"] for r in rows)
    for stage in range(3):
        graph = onnx.load(str(int8 / f"stage_{stage}.onnx"), load_external_data=False).graph
        own = {r["kind"]: r for r in rows if r["stage"] == str(stage)}
        for kind in ("MatMulNBits", "GroupQueryAttention", "QuickGelu"):
            assert own[kind]["count"] == sum(node.op_type == kind for node in graph.node)
        assert all(r["ms_per_token"] > 0 for r in own.values())
    assert "| stories-int8 | 2 | MatMulNBits |" in done.stdout and "| stories-int8 | 0 | all |" in done.stdout
    assert done.stdout.strip() in page.with_suffix(".md").read_text()
    assert not list(Path.cwd().glob("*trace*.json"))


def test_genai_is_measured_beside_it(int8: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    done = run(int8, "-p", 8, "-n", 4, "-r", 1, "--threads", 1, "--peer", f"genai={int8}", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    peer = [r for r in result["rows"] if r["bundle"] == f"genai: {int8.name}"]
    assert [(r["test"], r["tokens"], r["ratio"]) for r in peer] == [("prompt", 8, 1), ("decode", 4, 1)]
    assert all(r["ratio"] > 0 for r in result["rows"])
    assert result["versions"][f"genai: {int8.name}"].startswith("genai 0.")


def test_several_bundles_and_the_page(bundle: Any, int8: Path, tmp_path: Path) -> None:
    page = tmp_path / "figures.json"
    done = run(bundle.folder, int8, "-p", 8, "-n", 2, "-r", 1, "--threads", 1, "--save", page)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(page.read_text())["speed"]["stories260k"]["rows"]
    assert {r["bundle"] for r in rows} == {"stories", "stories-int8"} and rows[0]["ratio"] is None
    assert done.stdout.strip() in page.with_suffix(".md").read_text()
    one = run(bundle.folder, "-p", 8, "-n", 2, "-r", 1, "--threads", 1, "--loading", "--save", page)
    assert one.exit_code == 0 and one.stdout.strip() in page.with_suffix(".md").read_text()


def test_genai_makes_as_many_tokens_as_asked(int8: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from flrc_runtime.bench.genai_peer import measure

    model = og.Model(str(int8))
    ids = load(int8, threads=1).tokenizer.encode(TEXT)[:12]
    spent = [measure(og, model, ids, tokens) for tokens in (0, 200)]
    assert spent[0]["decode"] < spent[1]["decode"] / 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0), "decode 0 is not a positive number"),
        (("-p", -1), "prompt -1 is not"),
        (("-p", "8,x"), "not a list of whole numbers"),
        (("-r", 0), "repetitions 0 is not"),
        (("-p", 600), "context 665 is not from 2 to"),
        (("--peer", "vllm=README.md"), "'vllm' is not a peer"),
        (("--peer", "genai"), "not NAME=PATH"),
        (("--peer", "genai=nowhere"), "nowhere does not exist"),
        (("--speculative",), "--text FILE"),
        (("--text", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_usage_errors(bundle: Any, arguments: tuple[object, ...], message: str) -> None:
    done = run(bundle.folder, *arguments)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_text_that_is_short_or_no_text(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once")
    done = run(bundle.folder, "--text", tmp_path / "short.txt", "-p", 50)
    assert done.exit_code == 2 and "50 are asked for" in done.stderr
    (tmp_path / "binary").write_bytes(b"ab\xff")
    done = run(bundle.folder, "--text", tmp_path / "binary")
    assert done.exit_code == 2 and "not UTF-8 text at byte 2" in done.stderr


def test_speculation_needs_two_stages(tmp_path: Path) -> None:
    from flrc_edge import open_model
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings
    from flrc_exporters.bundle import export

    compress(open_model(str(STORIES)), tmp_path / "whole", Settings(keep=(1.0,)))
    export(tmp_path / "whole", tmp_path / "one")
    (tmp_path / "t.txt").write_text(TEXT)
    done = run(tmp_path / "one", "--text", tmp_path / "t.txt", "-p", 8, "--speculative")
    assert done.exit_code == 2 and "has one stage, none that could draft" in done.stderr


def test_peers_that_fail_say_so_in_one_sentence(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai")
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(FlrcError, match="genai: ") as caught:
        Peer("genai", tmp_path, threads=1, context=64)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="it has no genai_config"):
        Peer("genai", tmp_path.parent, threads=1, context=64)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "llama-bench" else found(name))
    with pytest.raises(FlrcError, match="node"):
        Peer("llama.cpp", tmp_path / "x.gguf", threads=1, context=64)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FlrcError, match="llama-bench or through node"):
        Peer("llama.cpp", tmp_path / "x.gguf", threads=1, context=64)


def test_a_peer_that_dies(int8: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    peer = Peer("genai", int8, threads=1, context=64)
    peer._process.kill()
    with pytest.raises(FlrcError, match="ended"):
        peer.measure([5, 6], 1)
    peer.close()
    assert isinstance(peer._process, subprocess.Popen) and peer._process.returncode is not None
