"""The whole way on stories260k in three stages, and on the real models at keep 1: what runs is what torch computes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import flrc_edge
from flrc_edge.cli import group
from flrc_edge.compression import compress
from flrc_edge.models import open_model
from flrc_edge.pull import is_pulled
from flrc_edge.settings import Settings
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_runtime import ScriptedStages, generate, load, manifest

TOKENS = 128


@dataclass(frozen=True)
class Way:
    """A checkpoint of three stages, its fp32 export, and the torch model of each stage."""

    checkpoint: Path
    bundle: Path
    stages: list[Any]


@pytest.fixture(scope="module", params=["plain", "pivoted"])
def way(
    request: pytest.FixtureRequest,
    compressed_stories: Any,
    stories_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Way:
    """The whole way in both forms of storage; pivoted, through the commands."""
    checkpoint, bundle = compressed_stories.checkpoint, stories_bundle
    if request.param == "pivoted":
        folder = tmp_path_factory.mktemp("pivoted-way")
        checkpoint, bundle = folder / "checkpoint", folder / "bundle"
        model = compressed_stories.source.path
        small = ("--tokens", 4096, "--window", 256, "--rank-step", 8)
        flrc("compress", model, "-o", checkpoint, "--stages", ".9,.8,.7", "--storage", "pivoted", *small)
        flrc("export", checkpoint, "-o", bundle, "--dtype", "fp32")
    return Way(checkpoint, bundle, [flrc_edge.load(checkpoint, stage=s) for s in range(3)])


def flrc(*arguments: object) -> str:
    """Run a command; return its stdout."""
    done = CliRunner().invoke(group, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def ids(compressed_stories: Any) -> torch.Tensor:
    """128 tokens of held-out text, the BOS token in front."""
    tokenizer = compressed_stories.source.tokenizer
    return token_windows(tokenizer, (WeightedText("austen-heldout"),), windows=1, length=TOKENS).ids


def torch_logits(stages: list[Any], ids: list[int], of_token: list[int]) -> np.ndarray:
    """Feed every token through its stage's model, one by one, all on one cache."""
    from transformers import DynamicCache

    cache, rows = DynamicCache(), []
    with torch.no_grad():
        for token, stage in zip(ids, of_token, strict=True):
            out = stages[stage](torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("stage", range(3))
def test_every_stage_equals_torch(way: Way, ids: torch.Tensor, stage: int) -> None:
    with torch.no_grad():
        expected = way.stages[stage](input_ids=ids).logits[0].numpy()
    found = load(way.bundle, threads=1).logits(ids[0].tolist(), stages=stage)
    assert found.shape == expected.shape == (TOKENS, 512)
    assert np.abs(found - expected).max() < 1e-3


def test_stages_differ_by_much_more(way: Way, ids: torch.Tensor) -> None:
    model = load(way.bundle, threads=1)
    logits = [model.logits(ids[0].tolist(), stages=s) for s in range(3)]
    assert min(np.abs(logits[0] - logits[1]).max(), np.abs(logits[1] - logits[2]).max()) > 0.1


@pytest.mark.parametrize(
    "script",
    [
        [0] * 40 + [1] * 48 + [2] * 40,
        [i % 3 for i in range(TOKENS)],
        [0] * (TOKENS - 1) + [2],
        [2, 0, 1] + [0] * (TOKENS - 3),
    ],
    ids=["schedule", "in turn", "last token", "back to stage 0"],
)
@pytest.mark.parametrize("chunk", [None, 1])
def test_switches_equal_torch(way: Way, ids: torch.Tensor, script: list[int], chunk: int | None) -> None:
    expected = torch_logits(way.stages, ids[0].tolist(), script)
    found = load(way.bundle, threads=1).logits(ids[0].tolist(), stages=script, chunk=chunk)
    assert np.abs(found - expected).max() < 1e-3


def test_an_answer_with_switches_is_torchs_greedy_answer(way: Way) -> None:
    model = load(way.bundle, threads=1)
    script = (0, 0, 0, 1, 1, 2, 2, 0, 1, 2)
    answer = generate(model, "Once upon a time", max_tokens=40, policy=ScriptedStages(script))
    prompt = model.tokenizer.encode("Once upon a time")
    fed = [*prompt, *answer.token_ids[:-1]]
    # Token i of the answer comes from feeding token i - 1 to its stage; the prompt belongs to stage 0.
    expected = torch_logits(way.stages, fed, [0] * len(prompt) + list(answer.stage_of_token[1:]))
    assert tuple(expected[len(prompt) - 1 :].argmax(-1)) == answer.token_ids
    assert len(answer.token_ids) == 40 and answer.stage_of_token[:10] == script


def test_the_schedule_of_the_checkpoint_decides(way: Way) -> None:
    schedule = manifest.read(way.checkpoint).schedule
    model = load(way.bundle, threads=1)
    assert model.manifest.schedule == schedule
    answer = generate(model, "Once upon a time", max_tokens=110)
    assert list(answer.stage_of_token) == [schedule.stage_at(i) for i in range(len(answer.token_ids))]


def test_more_stages_need_no_more_weights(
    compressed_stories: Any, stories_bundle: Path, tmp_path: Path
) -> None:
    """The weight file of three stages against that of stage 0 alone, which is the same ranks in one stage.

    In fp32: ranks in steps of 8 would be padded to blocks of 32 as integers.
    """
    from flrc_edge import checkpoint
    from flrc_edge.chunks import chunks_of
    from flrc_runtime.manifest import ProjectionPlan, RankPlan, Schedule

    three = compressed_stories.manifest
    projections = tuple(ProjectionPlan(p.name, p.shape, p.ranks[:1]) for p in three.plan.projections)
    single = RankPlan(three.plan.allocator, three.plan.keep[:1], projections, three.plan.scores)
    from safetensors.torch import load_file

    tensors = load_file(compressed_stories.checkpoint / checkpoint.FACTORS)
    factors = {}
    for p, staged in zip(projections, three.plan.projections, strict=True):
        if not p.dense:
            u, v = (
                [tensors[f"{p.name}.chunks.{i}.{side}"] for i in range(len(staged.chunks()))] for side in "UV"
            )
            factors[p.name] = chunks_of(torch.cat(u, 1), torch.cat(v), p)
    assert any(len(p.chunks()) == 2 for p in three.plan.projections)
    content = replace(three, plan=single, schedule=Schedule(()), files={})
    checkpoint.write(tmp_path / "one", content, source=compressed_stories.source, factors=factors)
    export(tmp_path / "one", tmp_path / "one.onnx", dtype="fp32")
    one, all_three = (
        (folder / "weights.bin").stat().st_size for folder in (tmp_path / "one.onnx", stories_bundle)
    )
    assert one <= all_three <= 1.15 * one  # ranks here are no multiples of 32, which blocks fill up


def test_bundle_and_checkpoint_tell_the_same(way: Way) -> None:
    bundle, checkpoint = manifest.verify(way.bundle), manifest.verify(way.checkpoint)
    for field in ("schedule", "calibration", "factorization"):
        assert getattr(bundle, field) == getattr(checkpoint, field)
    # What export adds to the plan are the number formats.
    floats = tuple(replace(p, formats=("fp32",) * len(p.matrices())) for p in checkpoint.plan.projections)
    assert bundle.plan == replace(checkpoint.plan, projections=floats, embedding="fp32")
    assert all(p.formats == () for p in checkpoint.plan.projections) and checkpoint.plan.embedding == ""
    assert [s.keep for s in bundle.stages] == [round(checkpoint.plan.kept(i), 6) for i in range(3)]
    sizes = [s.bytes for s in bundle.stages]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_pivoted_answer_in_integers(pivoted_stories: Any, tmp_path: Path, dtype: str) -> None:
    flrc("export", pivoted_stories.checkpoint, "-o", tmp_path / "b", "--dtype", dtype)
    answer = flrc("--quiet", "generate", tmp_path / "b", "Once upon a time", "--max-tokens", 20)
    assert len(answer.split()) > 5


def test_no_path_of_this_machine_is_written(way: Way) -> None:
    for folder in (way.bundle, way.checkpoint):
        for path in folder.iterdir():
            data = path.read_bytes()
            assert str(folder.parent).encode() not in data and str(Path.home()).encode() not in data, path


@pytest.mark.full
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b"])
def test_a_real_model_at_keep_one_is_hugging_faces(name: str, real_cache: Path, tmp_path: Path) -> None:
    """fp32, stage 0, 128 tokens of WikiText-2 that nothing was calibrated on."""
    if not is_pulled(name):
        pytest.skip(f"{name} is not in {real_cache}: flrc-edge pull {name}")
    loaded = open_model(name)
    text = (WeightedText("wikitext2-heldout"),)
    ids = token_windows(loaded.tokenizer, text, windows=1, length=TOKENS).ids
    with torch.no_grad():
        expected = loaded.model(input_ids=ids).logits[0].float().numpy()
    compress(loaded, tmp_path / "c", Settings(keep=(1.0,)))
    again = flrc_edge.load(tmp_path / "c")
    with torch.no_grad():
        assert np.array_equal(again(input_ids=ids).logits[0].float().numpy(), expected)
    del loaded, again
    export(tmp_path / "c", tmp_path / "b", dtype="fp32", context=512)
    found = load(tmp_path / "b").logits(ids[0].tolist(), stages=0)
    difference = float(np.abs(found - expected).max())
    print(
        json.dumps(
            {"model": name, "max |Δlogit|": difference, "largest |logit|": float(np.abs(expected).max())}
        )
    )
    assert difference <= max(1e-3, 5e-5 * float(np.abs(expected).max()))
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.99
