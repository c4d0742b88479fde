"""The whole way on stories260k in three stages, and on the real models at keep 1: what runs is what torch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flrc_edge
from flrc_edge.compression import Settings, compress
from flrc_edge.models import open_model
from flrc_edge.pull import is_pulled
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_runtime import ScriptedStages, generate, load, manifest

TOKENS = 128


@pytest.fixture(scope="module")
def stages(compressed_stories: Any) -> list[Any]:
    """The torch model of each stage."""
    return [flrc_edge.load(compressed_stories.checkpoint, stage=s) for s in range(3)]


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
def test_every_stage_equals_torch(
    stories_bundle: Path, stages: list[Any], ids: torch.Tensor, stage: int
) -> None:
    with torch.no_grad():
        expected = stages[stage](input_ids=ids).logits[0].numpy()
    found = load(stories_bundle, threads=1).logits(ids[0].tolist(), stages=stage)
    assert found.shape == expected.shape == (TOKENS, 512)
    assert np.abs(found - expected).max() < 1e-3


def test_stages_differ_by_much_more(stories_bundle: Path, ids: torch.Tensor) -> None:
    model = load(stories_bundle, threads=1)
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
def test_switches_equal_torch(
    stories_bundle: Path, stages: list[Any], ids: torch.Tensor, script: list[int], chunk: int | None
) -> None:
    expected = torch_logits(stages, ids[0].tolist(), script)
    found = load(stories_bundle, threads=1).logits(ids[0].tolist(), stages=script, chunk=chunk)
    assert np.abs(found - expected).max() < 1e-3


def test_an_answer_with_switches_is_torchs_greedy_answer(stories_bundle: Path, stages: list[Any]) -> None:
    model = load(stories_bundle, threads=1)
    script = (0, 0, 0, 1, 1, 2, 2, 0, 1, 2)
    answer = generate(model, "Once upon a time", max_tokens=40, policy=ScriptedStages(script))
    prompt = model.tokenizer.encode("Once upon a time")
    fed = [*prompt, *answer.token_ids[:-1]]
    # Token i of the answer comes from feeding token i - 1 to its stage; the prompt belongs to stage 0.
    expected = torch_logits(stages, fed, [0] * len(prompt) + list(answer.stage_of_token[1:]))
    assert tuple(expected[len(prompt) - 1 :].argmax(-1)) == answer.token_ids
    assert len(answer.token_ids) == 40 and answer.stage_of_token[:10] == script


def test_the_schedule_of_the_checkpoint_decides(stories_bundle: Path, compressed_stories: Any) -> None:
    schedule = compressed_stories.manifest.schedule
    model = load(stories_bundle, threads=1)
    assert model.manifest.schedule == schedule
    answer = generate(model, "Once upon a time", max_tokens=110)
    assert list(answer.stage_of_token) == [schedule.stage_at(i) for i in range(len(answer.token_ids))]


def test_more_stages_need_no_more_weights(
    compressed_stories: Any, stories_bundle: Path, tmp_path: Path
) -> None:
    """The weight file of three stages against that of stage 0 alone, which is the same ranks in one stage.

    In fp32: ranks in steps of 8 would be padded to blocks of 32 as integers.
    """
    from dataclasses import replace

    from flrc_edge import checkpoint
    from flrc_runtime.manifest import ProjectionPlan, RankPlan, Schedule

    three = compressed_stories.manifest
    projections = tuple(ProjectionPlan(p.name, p.shape, p.ranks[:1]) for p in three.plan.projections)
    single = RankPlan(three.plan.allocator, three.plan.keep[:1], projections, three.plan.scores)
    from safetensors.torch import load_file

    tensors = load_file(compressed_stories.checkpoint / checkpoint.FACTORS)
    factors = {p.name: (tensors[f"{p.name}.U"], tensors[f"{p.name}.V"]) for p in projections if not p.dense}
    content = replace(three, plan=single, schedule=Schedule(()), files={})
    checkpoint.write(tmp_path / "one", content, source=compressed_stories.source, factors=factors)
    export(tmp_path / "one", tmp_path / "one.onnx", dtype="fp32")
    one, all_three = (
        (folder / "weights.bin").stat().st_size for folder in (tmp_path / "one.onnx", stories_bundle)
    )
    assert one <= all_three <= 1.01 * one


def test_bundle_and_checkpoint_tell_the_same(compressed_stories: Any, stories_bundle: Path) -> None:
    bundle, checkpoint = manifest.verify(stories_bundle), compressed_stories.manifest
    for field in ("plan", "schedule", "calibration", "factorization"):
        assert getattr(bundle, field) == getattr(checkpoint, field)
    assert [s.keep for s in bundle.stages] == [round(checkpoint.plan.kept(i), 6) for i in range(3)]
    sizes = [s.bytes for s in bundle.stages]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_no_path_of_this_machine_is_written(stories_bundle: Path, compressed_stories: Any) -> None:
    for folder in (stories_bundle, compressed_stories.checkpoint):
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
