"""``--graph optimum``: families outside the table are compressed, exported through optimum and equal in ORTModel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import flrc_edge
from flrc_edge.cli import group
from flrc_edge.models import resolve_model
from flrc_edge.portable_shapes import portable_shapes
from flrc_exporters.optimum_graph import ENVIRONMENT
from flrc_runtime import manifest
from flrc_runtime.errors import UnsupportedModelError, VerificationError

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
SMALL = ("--stages", ".9,.7", "--boundaries", "8", "--tokens", "4096", "--window", "256", "--rank-step", "8")
RUN = """
import sys, numpy, torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, stage, out = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(folder, file_name=f"stage_{stage}.onnx")
ids = torch.tensor([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]])
whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
numpy.savez(out, logits=whole.numpy(), answer=answer.numpy())
"""
IDS = [[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]]
full = pytest.mark.full


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k as a granite, which computes the same with its multipliers at 1."""
    folder = tmp_path_factory.mktemp("granite") / "granite"
    shutil.copytree(STORIES, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": (config["hidden_size"] // config["num_attention_heads"]) ** -0.5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(granite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
    done = run("compress", granite, "-o", folder, "--graph", "optimum", "--storage", "pivoted", *SMALL)
    assert done.exit_code == 0, done.output
    assert "--graph optimum" in done.stdout.splitlines()[-1]
    return folder


@pytest.fixture(scope="session")
def optimum_environment() -> str:
    """Return the python of an environment with optimum-onnx, as ``make test-full`` makes it."""
    python = os.environ.get(ENVIRONMENT)
    if not python:
        pytest.skip(f"{ENVIRONMENT} names no environment with optimum-onnx (make .venv-optimum)")
    return python


def in_optimum(python: str, folder: Path, stage: int, scratch: Path) -> dict[str, Any]:
    out = scratch / f"stage-{stage}.npz"
    done = subprocess.run(
        [python, "-c", RUN, folder, str(stage), out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def test_a_family_outside_the_table_is_compressed_like_one_inside(
    granite: Path, checkpoint: Path, tmp_path: Path
) -> None:
    content = manifest.verify(checkpoint, "checkpoint")
    assert content.model.architecture == "granite"
    done = run("compress", STORIES, "-o", tmp_path / "llama", "--storage", "pivoted", *SMALL)
    assert done.exit_code == 0, done.output
    same = manifest.read(tmp_path / "llama")
    assert content.model.parameters == same.model.parameters
    assert [p.ranks for p in content.plan.projections] == [p.ranks for p in same.plan.projections]
    ids = torch.tensor(IDS)
    for stage in range(2):
        with torch.no_grad():
            ours, theirs = (
                flrc_edge.load(folder, stage)(input_ids=ids).logits
                for folder in (checkpoint, tmp_path / "llama")
            )
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_it_is_evaluated_beside_its_dense_model(granite: Path, checkpoint: Path) -> None:
    done = run("eval", checkpoint, "--dense", granite, "--windows", 1, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["texts"][0]["figures"]
    assert [f["stage"] for f in figures] == ["dense", "static:0", "static:1"]
    assert 0 < figures[1]["estimates"]["kl"]["value"] < figures[2]["estimates"]["kl"]["value"]


def test_without_the_option_it_is_refused_by_name(granite: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'granite' is not supported") as caught:
        resolve_model(str(granite))
    assert "--graph optimum" in caught.value.hint
    done = run("compress", granite, "-o", tmp_path / "c")
    assert (done.exit_code, "'granite' is not supported" in done.stderr) == (1, True)


@pytest.mark.parametrize("options", [("--dtype", "int8"), ("--target-size", "1MB")])
def test_integers_are_refused_before_any_work(
    granite: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    done = run("compress", granite, "-o", tmp_path / "c", "--graph", "optimum", *options)
    assert (done.exit_code, "takes float factors" in done.stderr) == (2, True), done.output
    assert not (tmp_path / "c").exists()


def test_layouts_that_cannot_be_read_are_named(granite: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    with pytest.raises(UnsupportedModelError, match=r"a phi has no model\.norm"):
        portable_shapes({"model_type": "phi", "intermediate_size": 64, **small})
    with pytest.raises(UnsupportedModelError, match="no model for model_type 'nonesuch'"):
        portable_shapes({"model_type": "nonesuch", **small})
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        portable_shapes({"model_type": "granite", "auto_map": {"AutoModel": "x.py"}, **small})
    scaled = tmp_path / "scaled"
    shutil.copytree(granite, scaled)
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"logits_scaling": 4.0}))
    done = run("compress", scaled, "-o", tmp_path / "c", "--graph", "optimum", *SMALL)
    assert (done.exit_code, "does more than its layers, norm and head" in done.stderr) == (1, True), (
        done.output
    )


def test_our_own_exporter_refuses_it(checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", checkpoint, "-o", tmp_path / "b")
    assert (done.exit_code, "--graph optimum" in done.stderr) == (1, True)
    assert not (tmp_path / "b").exists()


def test_an_environment_without_optimum(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    done = run("export", checkpoint, "-o", tmp_path / "b", "--graph", "optimum")
    assert (done.exit_code, "needs a Python environment with optimum-onnx" in done.stderr) == (1, True)
    for python, reason in ((sys.executable, "has no optimum-onnx"), (tmp_path / "none", "cannot be run")):
        done = run(
            "export", checkpoint, "-o", tmp_path / "b", "--graph", "optimum", "--optimum-python", python
        )
        assert (done.exit_code, reason in done.stderr) == (1, True), done.output
    done = run("export", checkpoint, "-o", tmp_path / "b", "--graph", "optimum", "--head", "int8")
    assert done.exit_code == 2
    assert not (tmp_path / "b").exists()


@full
def test_stages_load_in_ortmodel_with_equal_logits(
    optimum_environment: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "portable"
    done = run("export", checkpoint, "-o", folder, "--graph", "optimum")
    assert done.exit_code == 0, done.output
    content = manifest.verify(folder, "portable")
    ids = torch.tensor(IDS)
    for stage in range(2):
        model = flrc_edge.load(checkpoint, stage)
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.numpy()
        found = in_optimum(optimum_environment, folder, stage, tmp_path)
        assert np.abs(found["logits"] - wanted).max() <= 1e-4
        answer = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
        assert found["answer"].tolist() == answer.tolist()
    # every weight once: the tied head reads the embedding, stage 1 what stage 0 reads
    stored = sum(
        p.parameters(0) + (p.shape[0] * 2 if p.storage == "pivoted" else 0) for p in content.plan.projections
    )
    others = content.model.vocab_size * content.model.hidden_size + 11 * content.model.hidden_size
    assert content.files["weights.bin"].size <= 4 * (stored + others) + 4096 * 80
    assert content.stages[1].bytes < content.stages[0].bytes
    for command in ("generate", "serve"):
        done = run(command, folder, *(["hello"] if command == "generate" else []))
        assert (done.exit_code, "ORTModelForCausalLM" in done.stderr) == (3, True), done.output


@full
@pytest.mark.parametrize("dtype", ["int8", "int4/64"])
def test_integers_are_near(optimum_environment: str, checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "portable"
    done = run("export", checkpoint, "-o", folder, "--graph", "optimum", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    with torch.no_grad():
        wanted = flrc_edge.load(checkpoint, 0)(input_ids=torch.tensor(IDS)).logits.numpy()
    found = in_optimum(optimum_environment, folder, 0, tmp_path)["logits"]
    assert np.linalg.norm(found - wanted) <= (0.03 if dtype == "int8" else 0.35) * np.linalg.norm(wanted)


@full
@pytest.mark.parametrize("kind", ["llama", "qwen2", "stablelm", "smollm3"])
def test_other_families(optimum_environment: str, tmp_path: Path, kind: str) -> None:
    source = random_model(kind, tmp_path / kind)
    small = (
        "--stages",
        ".9,.7",
        "--boundaries",
        "8",
        "--tokens",
        "1024",
        "--window",
        "128",
        "--rank-step",
        "8",
    )
    done = run("compress", source, "-o", tmp_path / "c", "--graph", "optimum", *small)
    assert done.exit_code == 0, done.output
    done = run("export", tmp_path / "c", "-o", tmp_path / "p", "--graph", "optimum")
    assert done.exit_code == 0, done.output
    for stage in range(2):
        with torch.no_grad():
            wanted = flrc_edge.load(tmp_path / "c", stage)(input_ids=torch.tensor(IDS)).logits.numpy()
        found = in_optimum(optimum_environment, tmp_path / "p", stage, tmp_path)["logits"]
        assert np.abs(found - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())


def random_model(kind: str, folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STORIES / name, folder / name)
    return folder


def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flrc_exporters import portable

    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    data = bytearray((folder / "factors.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "factors.safetensors").write_bytes(data)
    monkeypatch.setattr(portable, "optimum_python", lambda given: "python")
    with pytest.raises(VerificationError, match="checksum mismatch"):
        portable.export_portable(folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()
