"""Speed and memory of a bundle: what is counted, what is compared, and peers that are not there."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from flrc_edge.cli import group
from flrc_runtime import FixedStage, FlrcError, Speculation, UsageError, load
from flrc_runtime.bench import bench
from flrc_runtime.bench.bandwidth import memory_bandwidth
from flrc_runtime.bench.loading import loading
from flrc_runtime.bench.peers import open_peer
from flrc_runtime.bench.subjects import Label, StageSubject, bundle_subjects
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


@pytest.fixture(scope="module")
def genai(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for onnxruntime-genai."""
    from flrc_exporters.bundle import export

    folder = tmp_path_factory.mktemp("genai") / "stories-genai"
    export(compressed_stories.checkpoint, folder, dtype="int8", stock=True)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(group, ["bench", *(str(a) for a in arguments)])


def test_rows_of_every_stage_and_length(bundle: Any) -> None:
    seen = []
    result = bench(
        [bundle.folder],
        baseline=bundle.folder,
        prompt_tokens=(24, 8),
        contexts=(40, 16),
        decode_tokens=4,
        repetitions=2,
        threads=1,
        progress=lambda *step: seen.append(step),
    )
    tests = (("prompt", 8, 2), ("prompt", 24, 2), ("decode", 16, 2), ("decode", 40, 2))
    assert [(r.test, r.tokens, r.samples, r.stage) for r in result.rows] == [
        (*test, stage) for test in tests for stage in ("0", "1", "0", "1")
    ]
    for row in result.rows:
        assert row.ms_per_token > 0 <= row.ms_spread and row.ratio is not None and row.ratio > 0
        assert row.tokens_per_second == pytest.approx(1e3 / row.ms_per_token)
        assert (row.ratio_low is None) == (row.samples < 6)
        if row.test == "prompt":
            assert row.gb_per_second is row.bytes_per_token is None
        else:
            size = open_bundle(bundle.folder).manifest.stages[int(row.stage)].bytes
            assert row.bytes_per_token == size
            assert row.gb_per_second == pytest.approx(size * row.tokens_per_second / 1e9)
    assert [r.ratio for r in result.rows[::4]] == [1, 1, 1, 1]
    assert result.bandwidth > 1e8 and not (result.loading or result.operators or result.beside)
    assert [move.bundle for move in result.moves] == [bundle.folder.name] * 2
    assert [what for what, done, total in seen if done == total] == [
        "Reading 8 tokens",
        "Reading 24 tokens",
        "Decoding behind 16 tokens",
        "Decoding behind 40 tokens",
    ]


def test_decoding_alone(bundle: Any) -> None:
    result = bench(
        [bundle.folder], prompt_tokens=(), contexts=(8,), decode_tokens=16, repetitions=3, threads=1
    )
    assert [(r.test, r.samples) for r in result.rows] == [("decode", 6)] * 2  # turns of 8 steps


def test_memory_bandwidth_is_that_of_reading() -> None:
    assert 1e9 < memory_bandwidth(1, repetitions=1) < 1e12


def test_a_step_goes_on_where_the_sequence_is(bundle: Any, model: Any) -> None:
    """The tokens are those that the model says, every time it goes back; a run makes the same ones."""
    ids = model.tokenizer.encode(TEXT)[:20]
    expected = list(model.stream(ids, max_tokens=6, policy=FixedStage(1)))
    subject = StageSubject(Label("x"), model, 1)
    subject.begin(ids, 6)
    for _ in range(2):
        subject.rewind()
        subject._token = expected[0].token_id
        for token in expected[1:]:
            assert subject.step() > 0
            assert subject._token == token.token_id
    subject._token = expected[0].token_id
    assert subject.run(5) > 0 and subject._token == expected[-1].token_id
    subject.end()
    assert subject.read(ids) > 0


def test_speculation_makes_the_tokens_it_counts(bundle: Any) -> None:
    opened, model = open_bundle(bundle.folder), load(bundle.folder, threads=1)
    ids = model.tokenizer.encode(TEXT)[:20]
    speculative = bundle_subjects(opened, model, speculation=Speculation(adaptive=False, most=3))[-1]
    speculative.begin(ids, 30)
    assert speculative.accepted is None and speculative.run(30) > 0
    assert speculative.accepted is not None and 0.3 < speculative.accepted <= 1  # stage 1 is nearly stage 0
    speculative.end()
    result = bench(
        [bundle.folder],
        prompt_tokens=(20,),
        contexts=(20,),
        decode_tokens=8,
        repetitions=1,
        threads=1,
        text=TEXT,
        speculation=Speculation(adaptive=False),
    )
    row = result.rows[-1]
    assert row.stage == "speculative" and row.test == "decode" and row.accepted is not None
    assert [r.stage for r in result.rows] == ["0", "1", "0", "1", "speculative"]  # stage 0 reads its prompts
    assert all(r.accepted is None for r in result.rows[:-1])


def test_loading(bundle: Any) -> None:
    found = loading(bundle.folder, stages=None, threads=1, repetitions=1)
    assert found.stages == 2 and found.first_token_seconds > found.open_seconds > found.session_seconds > 0
    assert (
        found.file_bytes
        == sum(p.stat().st_size for p in bundle.folder.iterdir() if p.name != "README.md")
        - (bundle.folder / "flrc.json").stat().st_size
    )
    model = load(bundle.folder, threads=1)
    assert found.cache_bytes == model.sessions.kv_shape.bytes_for(8 + 96)  # the prompt, the answer
    if Path("/proc/self/smaps_rollup").exists():
        assert found.loaded_bytes and found.used_bytes and found.private_bytes and found.process_bytes
        assert 0 < found.loaded_bytes <= found.used_bytes < found.process_bytes < 1e9


def test_a_bundle_that_does_not_open_in_its_process(bundle: Any, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "damaged")
    graph = tmp_path / "damaged" / "stage_0.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    with pytest.raises(FlrcError, match="in a process of its own: ") as caught:
        loading(tmp_path / "damaged", stages=None, threads=1, repetitions=1)
    assert "\n" not in str(caught.value)


def test_every_way_of_loading_is_in_the_table(bundle: Any) -> None:
    done = run(bundle.folder, "-p", 8, "-c", 8, "-n", 2, "-r", 1, "--threads", 1, "--loading", "--json")
    assert done.exit_code == 0, done.stderr
    assert [r["stages"] for r in json.loads(done.stdout)["loading"]] == [2, 1]


def test_beside_busy_processes(bundle: Any) -> None:
    done = run(bundle.folder, "-p", 8, "-c", 8, "-n", 2, "-r", 1, "--threads", 1, "--busy", 1, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["beside"]
    assert [(b["bundle"], b["stage"], b["processes"]) for b in found] == [
        (bundle.folder.name, stage, 1) for stage in ("0", "1")
    ]
    assert all(b["ms_alone"] > 0 < b["ratio"] and b["ratio_low"] is None for b in found)


@pytest.mark.parametrize("form", ["md", "csv"])
def test_forms(bundle: Any, form: str) -> None:
    done = run(
        bundle.folder, "-p", "8,16", "-c", 8, "-n", 4, "-r", 6, "--threads", 1, "--loading", "--busy", 1,
        "--baseline", bundle.folder, "--format", form,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert len(rows) == 12 and rows[0]["test"] == "prompt" and rows[0]["ratio"] == "1.0"
    else:
        keep = open_bundle(bundle.folder).manifest.stages[1].keep
        assert f"| stories | 1 | {keep:.2f} | decode behind 8 |" in done.stdout
        assert (
            "| MB/token | GB/s | of a product | ratio | 95 % |" in done.stdout
            and "| busy processes |" in done.stdout
        )
        assert "| stories | 2 | " in done.stdout and "| keys and values |" in done.stdout
        assert "moving to another stage costs" in done.stdout and "GB/s" in done.stdout.splitlines()[-1]


def test_operators_of_a_step_are_those_of_the_graph(bundle: Any, int8: Path, tmp_path: Path) -> None:
    page = tmp_path / "figures.json"
    done = run(int8, "-p", 8, "-c", 8, "-n", 2, "-r", 1, "--threads", 1, "--operators", "--save", page)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(page.read_text())["speed"]["stories260k"]["operators"]
    assert [r["stage"] for r in rows] == sorted(r["stage"] for r in rows)
    for stage in range(3):
        graph = onnx.load(str(int8 / f"stage_{stage}.onnx"), load_external_data=False).graph
        own = {r["kind"]: r for r in rows if r["stage"] == str(stage)}
        for kind in ("Linear", "Attention", "Embedding"):
            assert own[kind]["count"] == sum(node.op_type == kind for node in graph.node)
        assert all(r["ms_per_token"] > 0 for r in own.values())
    assert "| stories-int8 | 2 | Linear |" in done.stdout and "| stories-int8 | 0 | all |" in done.stdout
    assert done.stdout.strip() in page.with_suffix(".md").read_text()
    assert not list(Path.cwd().glob("*trace*.json"))


def test_genai_is_measured_beside_it(int8: Path, genai: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    done = run(
        int8, "-p", 8, "-c", "8,20", "-n", 6, "-r", 1, "--threads", 1, "--peer", f"genai={genai}", "--busy", 1, "--json"
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    peer = [r for r in result["rows"] if r["bundle"] == f"genai: {genai.name}"]
    assert [(r["test"], r["tokens"], r["samples"]) for r in peer] == [
        ("prompt", 8, 1),
        ("decode", 8, 1),
        ("decode", 20, 1),
    ]
    assert all(r["ratio"] > 0 for r in result["rows"]) and peer[-1]["samples"] == 1
    assert result["beside"][-1]["bundle"] == peer[0]["bundle"]
    assert result["versions"][f"genai: {genai.name}"].startswith("genai 0.")


def test_a_peer_as_what_all_are_compared_with(int8: Path, genai: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    done = run(
        int8, "-p", 8, "-c", 8, "-n", 2, "-r", 1, "--threads", 1, "--baseline", f"genai={genai}", "--json"
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["ratio"] for r in rows if r["bundle"].startswith("genai: ")] == [1, 1]
    assert [r["bundle"][:5] for r in rows] == ["genai", *["stori"] * 3] * 2


def test_several_bundles_and_the_page(bundle: Any, int8: Path, tmp_path: Path) -> None:
    page = tmp_path / "figures.json"
    small = ("-p", 8, "-c", 8, "-n", 2, "-r", 1, "--threads", 1)
    done = run(bundle.folder, int8, *small, "--busy", 1, "--save", page)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(page.read_text())["speed"]["stories260k"]["rows"]
    assert [(r["bundle"], r["ratio"] == 1) for r in rows[:3]] == [
        ("stories", True),
        ("stories", False),
        ("stories-int8", False),
    ]
    assert done.stdout.strip() in page.with_suffix(".md").read_text()
    one = run(bundle.folder, *small, "--loading", "--save", page)
    assert one.exit_code == 0 and one.stdout.strip() in page.with_suffix(".md").read_text()


def test_genai_makes_as_many_tokens_as_asked_and_goes_back(genai: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from flrc_runtime.bench.genai_peer import ROOM, Loop

    loop = Loop(str(genai), 1)
    ids = load(genai, threads=1).tokenizer.encode(TEXT)[:12]
    assert loop.read(ids, 20) > 0
    for _ in range(3):  # what it has room for, every time
        loop.rewind()
        assert loop._generator.token_count() == len(ids)
        assert loop.run(21) > 0
        assert len(ids) + 21 <= loop._generator.token_count() <= len(ids) + 20 + ROOM
    loop.end()


def test_genai_sleeps_when_it_is_anothers_turn(genai: Path) -> None:
    """Threads that spin on would take time from what is measured next."""
    pytest.importorskip("onnxruntime_genai")
    (peer,) = open_peer("genai", genai, threads=2)
    try:
        stat = Path(f"/proc/{peer._process.pid}/stat")
        if not stat.exists():
            pytest.skip("this system does not tell how long a process ran")
        peer.begin([5, 6, 7], 4)
        peer.step()

        def ticks() -> int:
            return sum(int(n) for n in stat.read_text().rsplit(")", 1)[1].split()[11:13])

        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 5  # hundredths of a second
    finally:
        peer.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0), "decode 0 is not a positive number"),
        (("-p", -1), "prompt -1 is not"),
        (("-p", "8,x"), "not a list of whole numbers"),
        (("-r", 0), "repetitions 0 is not"),
        (("-c", 0), "context 0 is not"),
        (("--busy", -1), "busy -1 is not"),
        (("-p", 600), "context 604 is not from 2 to"),
        (("-c", 600), "context 636 is not from 2 to"),
        (("--baseline", "genai=nowhere"), "nowhere does not exist"),
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
    done = run(bundle.folder, "--text", tmp_path / "short.txt", "-p", 50, "-c", 8)
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


def test_peers_that_fail_say_so_in_one_sentence(bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(FlrcError, match="genai: ") as caught:
        open_peer("genai", tmp_path, threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="it has no genai_config"):
        open_peer("genai", tmp_path.parent, threads=1)
    done = run(bundle.folder, "--peer", f"genai={tmp_path}")
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")] == [
        f"Error: {caught.value}"
    ]


def test_a_peer_that_dies(genai: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    (peer,) = open_peer("genai", genai, threads=1)
    peer.begin([5, 6], 1)
    peer._process.kill()
    with pytest.raises(FlrcError, match="ended"):
        peer.step()
    peer.close()
    assert isinstance(peer._process, subprocess.Popen) and peer._process.returncode is not None
