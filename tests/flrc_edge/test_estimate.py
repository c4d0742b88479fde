"""Estimates against real compressions, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_edge.compress_cost import compress_cost
from flrc_edge.compress_trial import REST, Trial
from flrc_edge.compression import compress
from flrc_edge.errors import UsageError
from flrc_edge.estimation import estimate, largest_keep
from flrc_edge.settings import default_storage
from flrc_exporters.architectures import DecoderConfig
from flrc_exporters.bundle import export

# Sizes as their makers publish them; Llama 3.1 8B and 70B.
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": False, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
LLAMA_1B = LLAMA | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
}  # fmt: skip
LLAMA_70B = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
TRIAL = Trial(head=1e-3, forward=1e-4, calibrate=4e-4, measure=5e-4, factorize=1.0)


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes some seconds for a model of 8 billion parameters."""
    monkeypatch.setattr(Trial, "of", lambda *_, **__: TRIAL)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["estimate", *map(str, arguments)])


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_within_a_tenth_of_a_real_bundle(
    compressed_stories: Any, dtype: Any, storage: Any, tmp_path: Path
) -> None:
    settings = replace(
        compressed_stories.settings, keep=(0.85, 0.7), storage=storage, boundaries=(9,),
        dtype="float" if dtype == "fp32" else dtype,
    )  # fmt: skip
    source = compressed_stories.source
    compress(source, tmp_path / "checkpoint", settings)
    real = export(tmp_path / "checkpoint", tmp_path / "bundle", dtype="fp32" if dtype == "fp32" else None)
    found = estimate(source.config, (0.85, 0.7), dtype=dtype, storage=storage, context=512)
    size = (tmp_path / "bundle" / "weights.bin").stat().st_size
    near = 0.15  # blocks of 32 pad the ranks of 64 features, which measured ranks have others of
    assert found.file_bytes == pytest.approx(size, rel=near)
    for guess, stage in zip(found.stages, real.stages, strict=True):
        assert guess.read_bytes == pytest.approx(stage.bytes, rel=near)
        assert guess.keep == pytest.approx(stage.keep, abs=0.03)


@pytest.mark.parametrize(("config", "billions"), [(LLAMA_8B, 8.03), (LLAMA_70B, 70.55)])
def test_published_sizes(config: dict[str, Any], billions: float) -> None:
    found = estimate(DecoderConfig.from_hf(config), (0.8,), context=8192)
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert found.plan.kept(0) == pytest.approx(0.8, abs=0.005)
    kv_heads, head_dim = 8, 128
    positions = 1008  # whole blocks of 16
    assert found.kv_bytes == positions * config["num_hidden_layers"] * 2 * kv_heads * head_dim * 2
    # int4 with a byte of scale in 32 is 4.25 bits a parameter; embedding and head of 128256 words in 8.25
    words = 2 * 128256 * config["hidden_size"]
    assert found.dense_bytes == pytest.approx(
        ((found.parameters - words) * 4.25 + words * 8.25) / 8, rel=0.01
    )


def test_more_takes_more() -> None:
    config = DecoderConfig.from_hf(LLAMA_8B)
    sizes = [estimate(config, (k,), context=2048) for k in (0.4, 0.6, 0.8, 1.0)]
    for a, b in pairwise(sizes):
        assert a.file_bytes < b.file_bytes and a.memory_bytes < b.memory_bytes
    assert sizes[-1].file_bytes == sizes[-1].dense_bytes
    longer = estimate(config, (0.8,), context=4096)
    assert longer.memory_bytes - sizes[2].memory_bytes == 2048 * longer.kv_bytes // 1008
    three = estimate(config, (0.8, 0.6, 0.4), context=2048)
    assert three.file_bytes < 1.1 * sizes[2].file_bytes  # stages share their weights
    options: dict[str, Any] = {"window": 1024, "storage": "plain", "integers": False, "trial": TRIAL}
    short, long = (compress_cost(config, tokens=t, **options) for t in (16384, 32768))
    assert short.memory_bytes == long.memory_bytes  # however long the text
    assert 1.3 < long.seconds / short.seconds < 2.1 and short.disk_bytes < long.disk_bytes


def test_a_trial_is_multiplied_by_layers_and_tokens() -> None:
    config = DecoderConfig.from_hf(LLAMA_8B)

    def seconds(trial: Trial, tokens: int) -> float:
        return trial.seconds(config, tokens=tokens, window=1024)

    none = Trial(0.0, 0.0, 0.0, 0.0, 0.0)
    files = seconds(none, 1024)
    assert 4 < files == seconds(none, 65536)
    measured = 8 * 1024  # tokens whose losses are measured at every rank, however many there are
    for name, count in (
        ("head", 32768 + measured),
        ("forward", 32 * (32768 + measured)),
        ("calibrate", 32 * 32768),
        ("measure", 32 * measured),
        ("factorize", 32),
    ):
        more = seconds(replace(none, **{name: 1.0}), 32768) - files
        assert more == pytest.approx(REST * count), name


def test_a_trial_runs_on_this_machine() -> None:
    stories = Path(__file__).parents[1] / "data" / "stories260k" / "config.json"
    config = DecoderConfig.from_hf(json.loads(stories.read_text()))
    trial = Trial.of(config, window=256, storage="plain")
    assert all(0 < value < 60 for value in astuple(trial))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float", "int4"])
def test_memory_of_a_real_compression(real_cache: Path, dtype: str, tmp_path: Path) -> None:
    from flrc_edge.models import resolve_model
    from flrc_edge.pull import is_pulled

    if not is_pulled("smollm2-135m"):
        pytest.skip("flrc-edge pull smollm2-135m first")
    script = (
        "import sys; from flrc_edge.compression import compress; from flrc_edge.settings import Settings;"
        "from flrc_edge.progress import peak_rss_bytes;"
        "compress('smollm2-135m', sys.argv[1], Settings(keep=(.8,), dtype=sys.argv[2], tokens=8192));"
        "print(peak_rss_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "c", dtype], capture_output=True, text=True, check=True
    )
    cost = compress_cost(
        resolve_model("smollm2-135m").config, tokens=8192, window=1024, storage=default_storage(dtype),
        integers=dtype != "float", trial=TRIAL,
    )  # fmt: skip
    assert cost.memory_bytes == pytest.approx(int(done.stdout), rel=0.1)


@pytest.mark.usefixtures("no_trial")
def test_largest_keep() -> None:
    assert largest_keep(lambda k: k <= 0.634, "x") == 0.63
    assert largest_keep(lambda _: True, "x") == 1.0

    def fits(keep: float) -> bool:
        if keep < 0.2:
            raise UsageError("keep is below the least")
        return keep < 0.21

    assert largest_keep(fits, "x") == 0.2

    def too_much(keep: float) -> bool:
        if keep < 0.2:
            raise UsageError("keep is below the least")
        return False

    with pytest.raises(UsageError, match="no keep fits 3MB"):
        largest_keep(too_much, "3MB")
    with pytest.raises(UsageError, match="no keep fits 3MB"):
        largest_keep(lambda _: False, "3MB")


def test_command_on_a_configuration_alone(tmp_path: Path) -> None:
    path = tmp_path / "llama" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_1B))
    found = json.loads(run(path, "--keep", ".8", "--json").stdout)
    assert found["model"] == "llama" and found["stages"][0]["keep"] == pytest.approx(0.8, abs=0.005)
    assert found["compress"]["memory_bytes"] > 4 * found["parameters"]


@pytest.mark.usefixtures("no_trial")
def test_command_on_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "llama" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_8B))
    for given in (path, path.parent):
        done = run(given, "--stages", ".9,.8", "--context", "4096")
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("llama: 8,030.3 M parameters, 6,979.3 M in projections\n")
        assert "stage 1: keep 0.8" in done.stdout and "context of 4096" in done.stdout


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize(
    ("option", "what"), [("--target-size", "file_bytes"), ("--target-ram", "memory_bytes")]
)
def test_targets(tmp_path: Path, option: str, what: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    found = json.loads(run(path, option, "4GB", "--json").stdout)
    assert 0.95 * 4e9 < found[what] <= 4e9


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", ".8", "--stages", ".9,.8"), "say the same thing twice"),
        (("--keep", ".9,.8"), "--keep takes one number"),
        (("--keep", "2"), "keep must lie in (0, 1], not 2"),
        (("--target-size", "1MB"), "no keep fits 1MB"),
        (("--target-size", "many"), "is not a size such as 600MB"),
        (("--context", "1"), "context 1 must lie between 2 and the model's 131072 tokens"),
        (("--tokens", "0"), "--tokens must be at least 2, not 0"),
    ],
)
def test_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    done = run(path, *arguments)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_check_compresses_and_keeps_other_models(tmp_path: Path) -> None:
    stories = Path(__file__).parents[1] / "data" / "stories260k"
    saved = tmp_path / "benchmarks.json"
    done = run(stories, "--check", "1024", "--save", saved, "--json")
    assert done.exit_code == 0, done.output
    (point,) = json.loads(done.stdout)["points"]
    assert (point["model"], point["tokens"], point["parameters"]) == ("stories260k", 1024, 260032)
    assert point["seconds"]["calibrate"] > 0 and 2e8 < point["peak_bytes"] < 3e9
    other = json.loads(saved.read_text())
    (kept,) = other["cost"]["compress"]["points"]
    other["cost"]["compress"]["points"] = [
        kept | {"peak_bytes": 1},
        kept | {"model": "another", "parameters": 7},
        kept | {"tokens": 2048},
    ]
    saved.write_text(json.dumps(other))
    assert run(stories, "--check", "1024", "--save", saved).exit_code == 0
    points = json.loads(saved.read_text())["cost"]["compress"]["points"]
    assert points[1]["peak_bytes"] > 1
    assert [(p["model"], p["tokens"]) for p in points] == [
        ("another", 1024), ("stories260k", 1024), ("stories260k", 2048),
    ]  # fmt: skip
    page = saved.with_suffix(".md").read_text()
    assert "| stories260k | 0 | 2048 |" in page and "images/cost-compress-tokens.svg" in page
    assert run(stories, "--save", saved).exit_code == 2
    assert run(stories, "--check", "100").exit_code == 2
    assert not list(tmp_path.glob("**/.cost-*"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama", "hidden_size": "64"}']
)
def test_a_bad_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    done = run(path)
    assert done.exit_code in (1, 3) and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
