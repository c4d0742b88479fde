"""The runtime computes what torch and onnxruntime-genai compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_runtime import FixedStage, ScriptedStages, generate
from flrc_runtime.engine import Model

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def torch_logits(stages: tuple[Any, ...], ids: list[int], of_token: list[int]) -> np.ndarray:
    """Feed every token through its stage's torch model, all on one cache."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = []
    with torch.no_grad():
        for token, stage in zip(ids, of_token, strict=True):
            output = stages[stage](torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1].numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    "script",
    [
        lambda n: [0] * n,
        lambda n: [1] * n,
        lambda n: [0] * (n // 2) + [1] * (n - n // 2),
        lambda n: [i % 2 for i in range(n)],
        lambda n: [0] * (n - 1) + [1],
        lambda n: [1, 1, 0, 0, 1] + [0] * (n - 5),
    ],
    ids=["stage 0", "stage 1", "half", "alternating", "last token", "two switches"],
)
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_logits_with_switches_equal_torch(bundle: Any, model: Model, script: Any, chunk: int | None) -> None:
    ids = model.tokenizer.encode(TEXT)
    of_token = script(len(ids))
    expected = torch_logits(bundle.stages, ids, of_token)
    found = model.logits(ids, stages=of_token, chunk=chunk)
    assert np.abs(found - expected).max() < 1e-3
    assert (
        np.abs(torch_logits(bundle.stages, ids, [0] * len(ids)) - expected).max() > 0.1 or 1 not in of_token
    )


def test_decoding_with_switches_equals_teacher_forcing(model: Model) -> None:
    """The step path (preallocated buffers, one binding a stage) against the chunk path."""
    script = (0, 0, 1, 1, 0, 1, 0, 0, 1)
    answer = generate(model, "Once upon a time", max_tokens=40, policy=ScriptedStages(script))
    prompt = model.tokenizer.encode("Once upon a time")
    assert answer.stage_of_token == script + (1,) * 31
    # token i is fed by the stage that computes token i + 1
    of_token = [0] * len(prompt) + list(answer.stage_of_token[1:])
    logits = model.logits([*prompt, *answer.token_ids[:-1]], stages=of_token)
    assert tuple(logits[len(prompt) - 1 :].argmax(-1)) == answer.token_ids


@pytest.mark.parametrize("stage", [0, 1])
def test_greedy_tokens_equal_onnxruntime_genai(
    stock: Path, model: Model, genai_greedy: Any, stage: int
) -> None:
    ids = model.tokenizer.encode("Once upon a time")
    expected = genai_greedy(stock, stage, ids, 64)
    assert len(expected) == 64
    answer = generate(model, ids, max_tokens=64, policy=FixedStage(stage))
    assert list(answer.token_ids) == list(expected)


def test_known_story(model: Model) -> None:
    """llama2.c documents this beginning of its greedy story."""
    answer = generate(model, [1], max_tokens=60, policy=FixedStage(0))
    assert answer.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )


def test_chunks_do_not_matter(model: Model) -> None:
    ids = (model.tokenizer.encode(TEXT) * 20)[:500]
    assert np.abs(model.logits(ids, chunk=500) - model.logits(ids, chunk=64)).max() < 1e-3
