"""SmolLM2-135M-Instruct through three stages: torch, the runtime and onnxruntime-genai agree."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.full
MODEL = "smollm2-135m"
DATA = Path(__file__).parents[2] / "flrc_edge" / "data"
TOKENS = 64
PROMPT = "Why do we brush our teeth twice a day?"


@pytest.fixture
def smollm2(real_cache: Path, tmp_path: Path) -> tuple[Any, Path]:
    """The loaded model and a three-stage checkpoint from a short calibration."""
    import flrc_edge
    from flrc_edge.compression import compress
    from flrc_edge.pull import is_pulled
    from flrc_edge.settings import Settings

    if not is_pulled(MODEL):
        pytest.skip(f"flrc-edge pull {MODEL} first")
    loaded = flrc_edge.open_model(MODEL)
    settings = Settings(
        keep=(0.95, 0.85, 0.7), tokens=4096, window=512, boundaries=(16, 32), reuse_statistics=False
    )
    compress(loaded, tmp_path / "checkpoint", settings)
    return loaded, tmp_path / "checkpoint"


def test_stages(smollm2: tuple[Any, Path], genai_greedy: Any, tmp_path: Path) -> None:
    import flrc_edge
    from flrc_edge.texts import WeightedText, token_windows
    from flrc_exporters.bundle import export
    from flrc_runtime import FixedStage, load

    loaded, checkpoint = smollm2
    text = (WeightedText("wikitext2-heldout"),)
    ids = token_windows(loaded.tokenizer, text, windows=1, length=128).ids
    export(checkpoint, tmp_path / "fp32", dtype="fp32")
    model = load(tmp_path / "fp32")

    # Each stage against the checkpoint in torch; chunks of 1 are decode steps through the in-place cache.
    reference = flrc_edge.load(checkpoint)
    for stage in range(3):
        flrc_edge.set_stage(reference, stage)
        with torch.no_grad():
            wanted = reference(input_ids=ids).logits[0].numpy()
        bound = max(1e-3, 5e-5 * float(np.abs(wanted).max()))
        got = model.logits(ids[0].tolist(), stages=stage, chunk=1)
        assert np.abs(got - wanted).max() <= bound, stage

    # A scripted switch sequence against torch that switches on the same tokens and one cache.
    script = [0] * 40 + [1] * 30 + [2] * 20 + [0] * 38
    edges = [0, *[i for i in range(1, 128) if script[i] != script[i - 1]], 128]
    past, rows = None, []
    for start, stop in pairwise(edges):
        flrc_edge.set_stage(reference, script[start])
        with torch.no_grad():
            out = reference(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0].numpy())
    wanted = np.concatenate(rows)
    got = model.logits(ids[0].tolist(), stages=script)
    assert np.abs(got - wanted).max() <= max(1e-3, 5e-5 * float(np.abs(wanted).max()))

    # The same switches through graphs of fixed shapes.
    export(checkpoint, tmp_path / "static", prefill=32, context=256)
    got = load(tmp_path / "static").logits(ids[0].tolist(), stages=script)
    assert np.abs(got - wanted).max() <= 1e-3

    # The weight file of three stages against that of stage 0 alone.
    alone = tmp_path / "alone"
    _export_stage_0(checkpoint, alone)
    for dtype in ("int8", "int4"):
        export(checkpoint, tmp_path / dtype, dtype=dtype)
        export(alone, tmp_path / f"alone-{dtype}", dtype=dtype)
        sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in (dtype, f"alone-{dtype}")]
        assert sizes[0] <= 1.01 * sizes[1]

    # Greedy tokens of the stock graphs in onnxruntime-genai.
    export(checkpoint, tmp_path / "stock", dtype="int8", stock=True)
    staged = load(tmp_path / "stock")
    prompt = list(staged.prompt_ids(PROMPT))
    for stage in range(3):
        tokens = [t.token_id for t in staged.stream(prompt, max_tokens=TOKENS, policy=FixedStage(stage))]
        theirs = genai_greedy(tmp_path / "stock", stage, prompt, TOKENS)
        ends = staged.manifest.model.eos_token_ids
        assert [t for t in theirs if t not in ends] == [t for t in tokens if t not in ends], stage


def _export_stage_0(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint, with stage 0 as its only stage: every projection in one chunk."""
    import shutil
    from dataclasses import replace

    from safetensors.torch import load_file, save_file

    from flrc_runtime import manifest

    shutil.copytree(checkpoint, target)
    content = manifest.read(checkpoint)
    tensors = load_file(target / "factors.safetensors")
    whole = {}
    for p in content.plan.projections:
        for side, along in (("U", 1), ("V", 0)) if not p.dense else ():
            chunks = [tensors[f"{p.name}.chunks.{i}.{side}"] for i in range(len(p.chunks()))]
            whole[f"{p.name}.chunks.0.{side}"] = torch.cat(chunks, along)
    save_file(whole, target / "factors.safetensors")
    plan = replace(
        content.plan,
        keep=content.plan.keep[:1],
        projections=tuple(replace(p, ranks=p.ranks[:1]) for p in content.plan.projections),
    )
    manifest.seal(target, replace(content, plan=plan, schedule=manifest.Schedule(())))


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_speculation_gives_the_tokens_of_stage_0(
    dtype: Any, smollm2: tuple[Any, Path], tmp_path: Path
) -> None:
    """On 50 prompts."""
    from flrc_exporters.bundle import export
    from flrc_runtime import FixedStage, Speculation, load

    export(smollm2[1], tmp_path / "bundle", dtype=dtype)
    model = load(tmp_path / "bundle")
    prompts = json.loads((DATA / "prompts.json").read_text("utf-8"))
    lines = (DATA / "chat_calibration.jsonl").read_text("utf-8").splitlines()
    prompts += [json.loads(line)["messages"][0]["content"] for line in lines]
    for prompt in prompts[:50]:
        alone = model.stream(prompt, max_tokens=32, policy=FixedStage(0))
        drafted = model.stream(prompt, max_tokens=32, speculation=Speculation(adaptive=False))
        assert [t.token_id for t in drafted] == [t.token_id for t in alone], prompt


def test_every_stage_on_the_simulator_of_an_npu(smollm2: tuple[Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed (flrc-edge[qnn])")
    from flrc_edge.accelerators import measure
    from flrc_exporters.bundle import export

    export(smollm2[1], tmp_path / "static", prefill=32, context=128)
    found = measure(tmp_path / "static", "qnn", soc="SM8650", tokens=9)
    assert len(found.graphs) == 6 and len(set(found.stages)) == 3
    for graph in found.graphs:
        assert graph.placed == graph.nodes > 1000
    assert found.relative_l2 < 0.02 and found.top1 == 1
    assert found.shared_bytes < 1.2 * max(graph.binary_bytes for graph in found.graphs)
