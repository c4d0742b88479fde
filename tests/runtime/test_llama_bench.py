"""llama.cpp through its ``llama-bench``, here a script that answers as that does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flrc_edge.cli import group
from flrc_runtime import FlrcError
from flrc_runtime.bench.llama_bench import LlamaBench
from flrc_runtime.bench.peers import open_peer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")

# Ten milliseconds a token in decoding, one in prompts.
ANSWERS = """
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
tokens = int(given["-p"]) * 1e6 + int(given["-n"]) * 1e7
print(json.dumps([{"build_commit": "abc123", "avg_ns": tokens}]))
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes the script and puts it on the PATH; it notes how it is called."""

    def written(answers: str = ANSWERS, options: str = "-d, --n-depth <n>") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "llama-bench"
        script.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            f"if '--help' in sys.argv: sys.exit(print({options!r}))\n"
            f"with open({str(tmp_path / 'calls')!r}, 'a') as calls: calls.write(json.dumps(sys.argv[1:]) + '\\n')\n"
            f"{answers}"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        return tmp_path / "m.gguf"

    return written


def test_what_it_is_asked(write: Write, tmp_path: Path) -> None:
    peer = LlamaBench(write(), threads=2)
    assert peer.version == "llama.cpp abc123" and peer.label.bundle == "llama.cpp: m.gguf (2 threads)"
    assert peer.read([1] * 64) == pytest.approx(0.064)
    peer.begin([1] * 100, 16)
    assert peer.run(16) == pytest.approx(0.16)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    same = ["-m", str(tmp_path / "m.gguf"), "-ngl", "0", "-r", "1", "-o", "json", "-t", "2"]
    assert calls == [
        [*same, "-p", "1", "-n", "0"],
        [*same, "-p", "64", "-n", "0"],
        [*same, "-p", "0", "-n", "16", "-d", "100"],
    ]


def test_it_is_measured_with_one_thread_as_well(write: Write) -> None:
    file = write()
    names = [[p.label.bundle for p in open_peer("llama.cpp", file, threads=n)] for n in (None, 1, 3)]
    one = "llama.cpp: m.gguf (1 thread)"
    assert names == [["llama.cpp: m.gguf", one], [one], ["llama.cpp: m.gguf (3 threads)", one]]


def test_rows_beside_a_bundle(bundle: Any, write: Write) -> None:
    arguments = [
        "bench",
        str(bundle.folder),
        "-p",
        "8,16",
        "-c",
        "8",
        "-n",
        "4",
        "-r",
        "2",
        "--threads",
        "1",
        "--json",
    ]
    done = CliRunner().invoke(group, [*arguments, "--peer", f"llama.cpp={write()}"])
    assert done.exit_code == 0, done.stderr
    rows = [r for r in json.loads(done.stdout)["rows"] if r["bundle"].startswith("llama.cpp: ")]
    assert [(r["test"], r["tokens"], r["samples"]) for r in rows] == [
        ("prompt", 8, 2),
        ("prompt", 16, 2),
        ("decode", 8, 2),
    ]
    assert [r["ms_per_token"] for r in rows] == pytest.approx([1, 1, 10]) and all(
        r["ratio"] > 0 for r in rows
    )


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        ("sys.exit('x\\nerror: no model')", "--n-depth", "m.gguf .1 thread.: llama-bench: error: no model$"),
        ("sys.exit(3)", "--n-depth", "llama-bench: it ended with 3$"),
        ("print('[]')", "--n-depth", "llama-bench answered with something else"),
        ("print('{')", "--n-depth", "llama-bench answered with something else"),
        ("print('[{}]')", "--n-depth", "llama-bench answered with something else"),
        (ANSWERS, "-p, -n", "it knows no --n-depth"),
    ],
)
def test_what_fails_is_one_sentence(write: Write, answers: str, options: str, message: str) -> None:
    with pytest.raises(FlrcError, match=message) as caught:
        LlamaBench(write(answers, options), threads=1)
    assert "\n" not in str(caught.value)


def test_it_is_not_there(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlrcError, match="which is not on the PATH") as caught:
        LlamaBench(file, threads=1)
    assert caught.value.hint is not None and "benchmarking.md" in caught.value.hint
