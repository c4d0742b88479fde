"""Built-in real models up to 0.5 B, all dense: fp32 equals Hugging Face, integers stay close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flrc_exporters.bundle import export

TEXT = (
    "Robert Boulter is an English film, television and theatre actor. He had a guest-starring role on the "
    "television series The Bill in 2000. This was followed by a starring role in the play Herons written by Simon "
    "Stephens, which was performed in 2001 at the Royal Court Theatre. He had a guest role in the television "
    "series Judge John Deed in 2002. In 2004 Boulter landed a role as Craig in the episode Teddy's Story of the "
    "television series The Long Firm; he starred alongside actors Mark Strong and Derek Jacobi. He was cast in "
    "the 2005 theatre productions of the Philip Ridley play Mercury Fur, which was performed at the Drum Theatre."
)
# Measured over 128 tokens of WikiText-2, int4 with an int4 head: smollm2 0.40, gemma 0.42, qwen 0.12; int8 0.0047,
# 0.0026, 0.0009.
BOUNDS = {"int8": 0.02, "int4": 0.8}


@pytest.mark.full
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b"])
def test_dense_export(
    name: str, real_cache: Path, tmp_path: Path, make_checkpoint: Callable[..., Any], open_stage: Any
) -> None:
    import flrc_edge
    from flrc_edge.pull import is_pulled

    if not is_pulled(name):
        pytest.skip(f"flrc-edge pull {name} first")
    loaded = flrc_edge.open_model(name)
    ids = torch.tensor(loaded.tokenizer(TEXT).input_ids)[:128]
    assert len(ids) == 128
    with torch.no_grad():
        wanted = loaded.model(input_ids=ids[None]).logits[0].numpy()
    checkpoint = make_checkpoint(
        tmp_path / "ckpt", loaded.model, lambda name, shape: (None,), tokenizer=loaded.path
    )
    export(checkpoint.folder, tmp_path / "fp32", dtype="fp32")
    got = open_stage(tmp_path / "fp32" / "stage_0.onnx").forced(ids, 16)
    assert np.abs(got - wanted).max() <= max(1e-3, 5e-5 * float(np.abs(wanted).max()))
    p = torch.from_numpy(wanted).double().log_softmax(-1)
    for dtype, most in BOUNDS.items():
        export(checkpoint.folder, tmp_path / dtype, dtype=dtype)  # type: ignore[arg-type]
        got = open_stage(tmp_path / dtype / "stage_0.onnx").forced(ids, 16)
        q = torch.from_numpy(got).double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) <= most
