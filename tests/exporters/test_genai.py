"""Every stage loads in onnxruntime-genai and gives the tokens of a plain onnxruntime loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

og = pytest.importorskip("onnxruntime_genai")
TOKENS = 64


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_greedy_tokens_equal(
    dtype: str,
    stage: int,
    bundles: Callable[..., Path],
    open_stage: Any,
    genai_greedy: Any,
    story_ids: torch.Tensor,
) -> None:
    bundle = bundles("staged", dtype, stock=True)
    prompt = story_ids[:12].tolist()
    wanted = open_stage(bundle / f"stage_{stage}.onnx").greedy(prompt, TOKENS)
    got = genai_greedy(bundle, stage, prompt, TOKENS)
    if got[-1] in (2,):  # genai stops at the end token, the plain loop does not
        wanted = wanted[: len(got)]
    assert got == wanted
    assert len(got) >= TOKENS // 2


def test_tokenizer_opens_in_genai(bundles: Callable[..., Path]) -> None:
    model = og.Model(str(bundles("staged", "fp32", stock=True)))
    assert len(og.Tokenizer(model).encode("Once upon a time")) > 1
