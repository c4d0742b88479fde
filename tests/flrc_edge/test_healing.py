"""Healing stories260k: what it gains, what it touches, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import flrc_edge
from flrc_edge.compression import compress
from flrc_edge.errors import FlrcError, NumericalError, UsageError
from flrc_edge.healing import REPORT, Healed, Point, Settings, heal
from flrc_edge.lowrank import ChunkProduct
from flrc_edge.settings import Settings as Compression
from flrc_edge.texts import WeightedText, token_windows
from flrc_runtime import manifest

WIKITEXT = (WeightedText("wikitext2"),)
QUICK = Settings(steps=3, window=48, tokens_per_step=96, validation_windows=2, lr=1e-3, texts=WIKITEXT)
NAMES = ("factors.safetensors", "base.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """stories260k in three stages, and its dense model."""

    folder: Path
    dense: Any


@pytest.fixture(scope="module")
def pivoted(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    dense = flrc_edge.open_model(str(stories))
    folder = tmp_path_factory.mktemp("pivoted") / "checkpoint"
    settings = Compression(
        keep=(0.9, 0.8, 0.7), tokens=2816, window=256, rank_step=8, boundaries=(16, 32), storage="pivoted"
    )
    compress(dense, folder, settings)
    return Checkpoint(folder, dense)


@pytest.fixture(scope="module")
def healed(pivoted: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Healed]:
    folder = tmp_path_factory.mktemp("healed") / "checkpoint"
    settings = Settings(
        steps=45, window=64, tokens_per_step=512, validate_every=20, validation_windows=16, lr=2e-3
    )
    result = heal(pivoted.folder, folder, settings, model=pivoted.dense)
    assert result is not None
    return folder, result


def divergences(folder: Path, dense: Any, text: str) -> list[float]:
    """Mean KL of every stage, written in the plainest way."""
    ids = token_windows(dense.tokenizer, (WeightedText(text),), windows=12, length=96, seed=1).ids
    student = flrc_edge.load(folder)
    result = []
    with torch.no_grad():
        target = dense.model(ids).logits.log_softmax(-1)
        for stage in range(manifest.read(folder).plan.num_stages):
            flrc_edge.set_stage(student, stage)
            found = student(ids).logits.log_softmax(-1)
            result.append(F.kl_div(found, target, log_target=True, reduction="sum").item() / ids.numel())
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for name in NAMES for k, v in load_file(folder / name).items()}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert all(new[k].dtype == v.dtype and new[k].shape == v.shape for k, v in old.items())
    return {k for k, v in old.items() if not torch.equal(v, new[k])}


def test_every_stage_gets_better_on_text_it_never_saw(
    pivoted: Checkpoint, healed: tuple[Path, Healed]
) -> None:
    for text in ("wikitext2-heldout", "austen-heldout"):
        before = divergences(pivoted.folder, pivoted.dense, text)
        after = divergences(healed[0], pivoted.dense, text)
        for stage, (b, a) in enumerate(zip(before, after, strict=True)):
            assert a < 0.9 * b, (text, stage, before, after)


def test_the_curve(pivoted: Checkpoint, healed: tuple[Path, Healed]) -> None:
    folder, result = healed
    assert [p.step for p in result.curve] == [0, 20, 40, 45]
    assert result.tokens == 45 * 512
    first, last = result.curve[0], result.curve[-1]
    assert first.train == (None, None, None) and None not in last.train
    assert all(a < 0.9 * b for a, b in zip(last.validation, first.validation, strict=True))
    assert list(first.validation) == sorted(first.validation)
    assert 0 < first.minutes < last.minutes
    content = manifest.verify(folder, "checkpoint")
    assert REPORT in content.files and content == result.manifest
    (run,) = json.loads((folder / REPORT).read_text())["runs"]
    assert run["tokens"] == result.tokens and run["settings"]["steps"] == 45
    assert [Point.from_dict(p) for p in run["curve"]] == list(result.curve)
    assert {t["name"] for t in run["texts"]} == {"chat", "wikitext2", "austen"}


def test_the_first_point_is_the_checkpoint_itself(pivoted: Checkpoint, tmp_path: Path) -> None:
    """The chunked KL on the held-out windows equals torch's own over whole logits."""
    points: list[Point] = []
    settings = replace(QUICK, steps=1, validation_windows=3, precision="float32")
    heal(pivoted.folder, tmp_path / "h", settings, model=pivoted.dense, on_point=points.append)
    from flrc_edge.healing.windows import training_windows

    ids = training_windows(pivoted.dense.tokenizer, WIKITEXT, length=48, validation=3).validation
    student = flrc_edge.load(pivoted.folder)
    for stage in range(3):
        flrc_edge.set_stage(student, stage)
        with torch.no_grad():
            target, found = (m(ids).logits.log_softmax(-1) for m in (pivoted.dense.model, student))
        expected = F.kl_div(found, target, log_target=True, reduction="sum").item() / ids.numel()
        assert points[0].validation[stage] == pytest.approx(expected, rel=1e-4)


def test_only_factors_change(pivoted: Checkpoint, healed: tuple[Path, Healed]) -> None:
    names = changed(pivoted.folder, healed[0])
    factors = set(load_file(pivoted.folder / NAMES[0]))
    assert names <= factors and {n for n in factors if not n.endswith(".order")} <= names
    assert any(".chunks.1." in name for name in names)


def products(folder: Path) -> dict[str, torch.Tensor]:
    """The matrix of every chunk."""
    model = flrc_edge.load(folder)
    return {
        name: module(torch.eye(module.V.shape[1])).T
        for name, module in model.named_modules()
        if isinstance(module, ChunkProduct)
    }


def test_an_unused_chunk_stays_what_it_is(pivoted: Checkpoint, tmp_path: Path) -> None:
    """The smallest stage reads only the first chunks, so a run on it alone trains nothing else."""
    settings = replace(QUICK, steps=2, stage_weights=(1e-9, 1e-9, 1.0))
    heal(pivoted.folder, tmp_path / "h", settings, model=pivoted.dense)
    before, after = products(pivoted.folder), products(tmp_path / "h")
    moved = {name: ((after[name] - b).norm() / b.norm()).item() for name, b in before.items()}
    assert all(m < 1e-5 for name, m in moved.items() if ".chunks.0" not in name)
    assert all(m > 1e-4 for name, m in moved.items() if ".chunks.0" in name)
    assert any(".chunks.1" in name for name in moved)


@pytest.mark.parametrize("train", ["projections", "all"])
def test_what_else_may_be_trained(pivoted: Checkpoint, tmp_path: Path, train: Any) -> None:
    heal(pivoted.folder, tmp_path / "h", replace(QUICK, train=train), model=pivoted.dense)
    names = {n for n in changed(pivoted.folder, tmp_path / "h") if ".chunks." not in n}
    base = load_file(pivoted.folder / NAMES[1]).keys()
    dense = {n for n in base if n.endswith("proj.weight")}
    norms = {n for n in base if n.endswith("norm.weight")}
    assert names == (dense if train == "projections" else dense | norms)
    assert norms and "model.embed_tokens.weight" not in names


def test_plain_factors_and_biases(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = flrc_edge.open_model(str(family_model("qwen2")))
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    compress(
        source,
        tmp_path / "c",
        Compression(keep=(0.6,), tokens=512, window=64, rank_step=8, allocator="uniform", storage="plain"),
    )
    settings = replace(QUICK, steps=8, train="all", validation_windows=4)
    result = heal(tmp_path / "c", tmp_path / "h", settings, model=source)
    assert result is not None and result.curve[-1].validation < result.curve[0].validation
    names = changed(tmp_path / "c", tmp_path / "h")
    assert any(n.endswith("q_proj.bias") for n in names) and any(n.endswith(".U") for n in names)
    after = source.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None for p in source.model.parameters())


def test_healing_twice_keeps_both_reports(
    pivoted: Checkpoint, healed: tuple[Path, Healed], tmp_path: Path
) -> None:
    heal(healed[0], tmp_path / "h", QUICK, model=pivoted.dense)
    runs = json.loads((tmp_path / "h" / REPORT).read_text())["runs"]
    assert [run["settings"]["steps"] for run in runs] == [45, 3]
    assert runs[1]["curve"][0]["validation"] < runs[0]["curve"][0]["validation"]


def test_a_checkpoint_of_bfloat16_stays_one(pivoted: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted.folder, tmp_path / "c")
    base = {k: v.bfloat16() for k, v in load_file(folder / NAMES[1]).items()}
    save_file(base, folder / NAMES[1])
    content = manifest.seal(folder, replace(manifest.read(pivoted.folder), dtype="bfloat16"))
    heal(folder, tmp_path / "h", replace(QUICK, train="all"), model=pivoted.dense)
    assert changed(folder, tmp_path / "h")  # asserts that every dtype is as it was
    assert manifest.read(tmp_path / "h").dtype == content.dtype


def test_a_measured_schedule_is_measured_again(pivoted: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted.folder, tmp_path / "c")
    content = manifest.read(folder)
    invented = replace(content.schedule, divergence=((9.0,), (9.0,), (9.0,)), horizon=16, block=16)
    manifest.seal(folder, replace(content, schedule=invented))
    heal(folder, tmp_path / "h", QUICK, model=pivoted.dense)
    found = manifest.read(tmp_path / "h").schedule
    assert len(found.boundaries) == 2 and found.divergence and found.divergence != invented.divergence


def test_the_export_takes_it(healed: tuple[Path, Healed], tmp_path: Path) -> None:
    from flrc_exporters.bundle import export

    export(healed[0], tmp_path / "b", dtype="fp32")
    assert REPORT not in manifest.verify(tmp_path / "b", "bundle").files


def test_minutes(pivoted: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, steps=None, minutes=0.05)
    result = heal(
        pivoted.folder,
        tmp_path / "h",
        settings,
        model=pivoted.dense,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert result is not None and result.curve[-1].step > 0
    assert 0.02 < result.curve[-1].minutes < 0.2
    assert seen == sorted(set(seen)) and all(done <= total == 3 for done, total in seen)


def test_mixed_precision(pivoted: Checkpoint, tmp_path: Path) -> None:
    settings = replace(
        QUICK, steps=30, tokens_per_step=480, precision="bfloat16", stage_weights=(1, 1, 4), lr=1e-2
    )
    result = heal(pivoted.folder, tmp_path / "h", settings, model=pivoted.dense)
    assert result is not None
    first, last = result.curve[0].validation, result.curve[-1].validation
    assert last[2] < 0.95 * first[2]
    report = json.loads((tmp_path / "h" / REPORT).read_text())["runs"][0]
    assert report["precision"] == "bfloat16"
    assert all(t.dtype in (torch.float32, torch.int64) for t in tensors(tmp_path / "h").values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3, "minutes": 1.0}, "steps or minutes"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": 0.0}, "minutes must be a positive number"),
        ({"minutes": float("nan")}, "minutes must be a positive number"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"window": 1}, "window must be at least 2"),
        ({"tokens_per_step": 100}, "100 tokens a step do not fill one window of 512"),
        ({"clip": float("inf")}, "clip must be 0 or more"),
        ({"warmup": 1.0}, "warmup must lie"),
        ({"train": "head"}, "train 'head' is not one of factors, projections, all"),
        ({"precision": "int4"}, "precision 'int4' is not one of"),
        ({"texts": ()}, "name at least one text"),
        ({"texts": (WeightedText("austen-heldout"),)}, "austen-heldout is kept for measurements"),
        ({"stage_weights": (1.0, 0.0)}, "stage weights must be positive"),
        ({"seed": -1}, "seed must lie"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**fields)


def test_by_default_there_is_a_number_of_steps() -> None:
    assert Settings().steps and Settings(minutes=2.0).steps is None


def test_the_wrong_dense_model_is_refused(
    pivoted: Checkpoint, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, message in (
        ("qwen2", "has architecture qwen2, checkpoint was compressed from a model with llama"),
        ("llama", "num_layers 3, checkpoint was compressed from a model with 5"),
    ):
        with pytest.raises(UsageError, match=message):
            heal(pivoted.folder, tmp_path / "h", QUICK, model=str(family_model(name)))
    wide = replace(pivoted.dense, config=replace(pivoted.dense.config, intermediate_size=999))
    with pytest.raises(UsageError, match=r"gate_proj of stories260k is \(999, 64\)"):
        heal(pivoted.folder, tmp_path / "h", QUICK, model=wide)
    with pytest.raises(UsageError, match="compressed from stories260k, which is not a built-in model"):
        heal(pivoted.folder, tmp_path / "h", QUICK)
    assert not list(tmp_path.iterdir())


def test_other_refusals(pivoted: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "short.txt").write_text("A short text that fills no two windows. " * 3)
    damaged = shutil.copytree(pivoted.folder, tmp_path / "damaged")
    with (damaged / NAMES[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    cases: list[tuple[Path, str, Settings, str]] = [
        (pivoted.folder, "full", QUICK, "exists already"),
        (damaged, "h", QUICK, "checksum mismatch in factors.safetensors"),
        (tmp_path / "nothing", "h", QUICK, "is not a folder"),
        (pivoted.folder, "h", replace(QUICK, stage_weights=(1.0,)), "1 stage weights are given"),
        (
            pivoted.folder,
            "h",
            replace(QUICK, texts=(WeightedText(str(tmp_path / "short.txt")),)),
            "short.txt",
        ),
        (pivoted.folder, "h", replace(QUICK, texts=(WeightedText("nope"),)), "there is no text 'nope'"),
    ]
    for source, target, settings, message in cases:
        with pytest.raises(FlrcError, match=message):
            heal(source, tmp_path / target, settings, model=pivoted.dense)
    assert not (tmp_path / "h").exists() and not list(tmp_path.glob(".*"))


def test_a_checkpoint_without_factors(pivoted: Checkpoint, tmp_path: Path) -> None:
    compress(pivoted.dense, tmp_path / "c", Compression(keep=(1.0,)))
    with pytest.raises(UsageError, match="holds no factors"):
        heal(tmp_path / "c", tmp_path / "h", QUICK, model=pivoted.dense)


def test_a_step_that_is_not_finite_is_named(pivoted: Checkpoint, tmp_path: Path) -> None:
    settings = replace(QUICK, steps=30, lr=1e12, clip=0.0, save_minutes=1e-9)
    with pytest.raises(NumericalError, match=r"^the (KL|gradient) of stage \d is not finite in step (\d+)$"):
        heal(pivoted.folder, tmp_path / "h", settings, model=pivoted.dense)
    assert not (tmp_path / "h").exists()
    with pytest.raises(NumericalError, match="in step"):  # the kept state is read and leads to the same place
        heal(pivoted.folder, tmp_path / "h", settings, model=pivoted.dense, resume=True)


SCRIPT = """
import sys
import torch
from flrc_edge.healing import Settings, heal
from flrc_edge.lowrank import ChunkProduct
from flrc_edge.texts import WeightedText
torch.set_num_threads(1)
settings = Settings(steps=4, window=48, tokens_per_step=192, validation_windows=3, texts=(WeightedText("wikitext2"),),
                    precision="float32")
heal(sys.argv[1], sys.argv[2], settings, model=sys.argv[3])
"""


@pytest.mark.full
def test_two_processes_heal_as_one(pivoted: Checkpoint, stories: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
    ]  # fmt: skip
    for target, prefix in ((one, []), (two, launch)):
        done = subprocess.run(
            [sys.executable, *prefix, script, pivoted.folder, target, stories],
            capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    start, alone, both = (
        products(f) for f in (pivoted.folder, one, two)
    )  # other pivot rows make the same product
    assert start
    for name in start:
        moved = (alone[name] - start[name]).norm()
        assert (both[name] - alone[name]).norm() < 0.05 * moved, name
    curves = [json.loads((f / REPORT).read_text())["runs"][0]["curve"] for f in (one, two)]
    assert curves[0][0]["validation"] == pytest.approx(curves[1][0]["validation"], rel=1e-5)
