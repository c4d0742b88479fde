"""EleutherAI's lm-evaluation-harness on any stage of a checkpoint or bundle, beside its own backends.

``python -m flrc_edge.evaluation.harness run --model flrc-edge --model_args pretrained=CHECKPOINT,stage=1 …`` is its
command line with two more models: ``flrc-edge`` (a checkpoint, torch) and ``flrc-edge-genai`` (a bundle,
onnxruntime-genai). Needs ``pip install lm_eval``; tried with 0.4.13.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

from flrc_edge.checkpoint import load
from flrc_edge.errors import FlrcError
from flrc_edge.tokenizer_files import open_tokenizer
from flrc_runtime import manifest
from flrc_runtime.policy import checked_stage


@register_model("flrc-edge")
class CheckpointLM(HFLM):  # type: ignore[misc]
    """One stage of a checkpoint.

    Args:
        pretrained: The checkpoint.
        stage: Its stage.
        add_bos_token: Whether contexts start with BOS; None for what the tokenizer does.
        max_length: Tokens of a window; None for the model's context.
        batch_size: Given by the harness.
        max_batch_size: Given by the harness.
        device: Given by the harness; the model is on the CPU.
    """

    def __init__(
        self,
        pretrained: str,
        stage: int = 0,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(
            pretrained=load(pretrained, stage=stage),
            tokenizer=open_tokenizer(Path(pretrained)),
            backend="causal",
            add_bos_token=add_bos_token,
            max_length=max_length,
            batch_size=batch_size,
            max_batch_size=max_batch_size or 64,
        )


@register_model("flrc-edge-genai")
class BundleLM(ONNXRuntimeGenAILM):  # type: ignore[misc]
    """One stage of a bundle; the harness's own ``onnxruntime-genai`` reads stage 0.

    Args:
        pretrained: The bundle.
        stage: Its stage.
        max_length: Tokens of a window; None for the bundle's context.
        batch_size: Given by the harness.
        max_batch_size: Given by the harness.
        device: Given by the harness; the graphs run on the CPU.
    """

    def __init__(
        self,
        pretrained: str,
        stage: int = 0,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        stages = manifest.read(Path(pretrained), "bundle").stages
        self._graph = stages[checked_stage(stage, len(stages))].graph
        super().__init__(pretrained, max_length=max_length, batch_size=int(batch_size))

    def _select_ep(self, config: Any) -> None:
        super()._select_ep(config)
        config.overlay(json.dumps({"model": {"decoder": {"filename": self._graph}}}))


def main() -> None:
    """Run the harness's command line; a user's mistake is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except FlrcError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
