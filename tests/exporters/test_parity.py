"""Every stage graph computes what the torch model with the factors of that stage computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def bound(logits: np.ndarray) -> float:
    return max(1e-3, 5e-5 * float(np.abs(logits).max()))


def test_dense_stage_equals_the_hugging_face_model(
    bundles: Callable[[str, str], Path],
    dense_checkpoint: Any,
    open_stage: Any,
    story_ids: torch.Tensor,
) -> None:
    with torch.no_grad():
        wanted = dense_checkpoint.model(input_ids=story_ids[None]).logits[0].numpy()
    graph = bundles("dense", "fp32") / "stage_0.onnx"
    assert np.abs(open_stage(graph).run(story_ids) - wanted).max() <= bound(wanted)
    assert np.abs(open_stage(graph).forced(story_ids, 5) - wanted).max() <= bound(wanted)


@pytest.mark.parametrize("source", ["staged", "pivoted"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_equals_its_torch_reference(
    stage: int,
    source: str,
    bundles: Callable[[str, str], Path],
    request: pytest.FixtureRequest,
    open_stage: Any,
    story_ids: torch.Tensor,
) -> None:
    wanted = request.getfixturevalue(f"{source}_checkpoint").stage_logits(story_ids, stage)
    graph = bundles(source, "fp32") / f"stage_{stage}.onnx"
    assert np.abs(open_stage(graph).run(story_ids) - wanted).max() <= bound(wanted)
    assert np.abs(open_stage(graph).forced(story_ids, 5) - wanted).max() <= bound(wanted)
