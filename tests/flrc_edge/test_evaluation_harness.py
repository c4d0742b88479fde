"""lm-evaluation-harness on a checkpoint and on a bundle: the two small tasks of tests/data/lm_eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_every_stage_scores_the_same_through_torch_and_onnxruntime_genai(
    compressed_stories: Any, stories_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(ROOT)  # the tasks name their files from there
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
    pytest.importorskip("onnxruntime_genai")
    from lm_eval.tasks import TaskManager

    from flrc_edge.evaluation.harness import BundleLM, CheckpointLM

    manager = TaskManager(include_path=str(ROOT / "tests" / "data" / "lm_eval"), include_defaults=False)

    def scores(model: Any) -> dict[str, float]:
        found = lm_eval.simple_evaluate(
            model=model, tasks=["flrc_completions", "flrc_austen"], task_manager=manager, bootstrap_iters=0
        )["results"]
        return {
            "accuracy": found["flrc_completions"]["acc,none"],
            "bits per byte": found["flrc_austen"]["bits_per_byte,none"],
        }

    bits = []
    for stage in range(3):
        # The bundle's backend adds no BOS to a context.
        torch_scores = scores(
            CheckpointLM(str(compressed_stories.checkpoint), stage=stage, add_bos_token=False)
        )
        assert scores(BundleLM(str(stories_bundle), stage=stage)) == pytest.approx(torch_scores, abs=1e-3)
        assert torch_scores["accuracy"] > 0.5  # chance is 0.25
        bits.append(torch_scores["bits per byte"])
    assert len({round(b, 3) for b in bits}) == 3  # each stage is another model
