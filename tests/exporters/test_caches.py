"""Keys and values in float32, float16 and int8: the graph says which, the runtime follows, answers hardly differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from flrc_edge.cli import group
from flrc_exporters.bundle import export
from flrc_exporters.own_form import CACHE_BYTES, Cache, cache_block_bytes
from flrc_runtime import generate, load
from flrc_runtime.errors import UsageError
from flrc_runtime.graph_file import cache_numbers

# Largest KL to the float32 cache over a story, weights in fp32. Measured: 2e-6 and 5e-3 (heads of 8 numbers).
MOST = {"float32": 0.0, "float16": 1e-5, "int8": 2e-2}


def log_softmax(logits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits).double().log_softmax(-1)


@pytest.fixture(scope="module")
def story(staged_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], np.ndarray]:
    """Tokens of the dense model's own story, and their logits with a cache of float32."""
    folder = tmp_path_factory.mktemp("story") / "bundle"
    export(staged_checkpoint.folder, folder, dtype="fp32")
    model = load(folder, threads=1)
    prompt = model.tokenizer.encode("Once upon a time")
    ids = [*prompt, *generate(model, "Once upon a time", max_tokens=150).token_ids]
    return ids, model.logits(ids)


@pytest.mark.parametrize("cache", CACHE_BYTES)
def test_a_cache(
    cache: Cache, staged_checkpoint: Any, story: tuple[list[int], np.ndarray], tmp_path: Path
) -> None:
    manifest = export(staged_checkpoint.folder, tmp_path / "bundle", dtype="fp32", cache=cache)
    heads, dim, layers = 4, 8, 5
    size = cache_block_bytes(dim, cache)
    assert size == 16 * (dim * {"float32": 4, "float16": 2, "int8": 1}[cache] + (4 if cache == "int8" else 0))
    for stage in manifest.stages:
        path = tmp_path / "bundle" / stage.graph
        graph = onnx.load(str(path), load_external_data=False).graph
        for value in (*graph.input, *graph.output):
            if value.name.startswith(("past_key_values", "present")):
                shape = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
                assert shape[:2] == [1, heads] and shape[3] == size
        assert cache_numbers(path) == cache
    model = load(tmp_path / "bundle", threads=1)
    assert model.sessions.kv_shape.bytes_for(33) == 2 * layers * heads * 3 * size
    ids, wanted = story
    p, q = log_softmax(wanted), log_softmax(model.logits(ids, chunk=7))
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= MOST[cache]
    one_by_one = model.logits(ids, chunk=1)
    assert np.array_equal(one_by_one, model.logits(ids))  # what is rounded does not depend on how it comes
    shown = CliRunner().invoke(group, ["inspect", str(tmp_path / "bundle")]).output
    assert f"keys and values are kept in {cache}" in shown


@pytest.mark.parametrize(("dtype", "cache"), [("fp32", "float32"), ("int8", "float16"), ("int4", "float16")])
def test_the_default(dtype: Any, cache: str, dense_checkpoint: Any, tmp_path: Path) -> None:
    export(dense_checkpoint.folder, tmp_path / "bundle", dtype=dtype)
    assert cache_numbers(tmp_path / "bundle" / "stage_0.onnx") == cache


@pytest.mark.parametrize("options", [{"stock": True}, {"prefill": 16}], ids=["stock", "static"])
def test_other_graphs_keep_floats(options: dict[str, Any], dense_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cache"):
        export(dense_checkpoint.folder, tmp_path / "bundle", cache="int8", **options)
    export(dense_checkpoint.folder, tmp_path / "bundle", **options)
    assert cache_numbers(tmp_path / "bundle" / "stage_0.onnx") is None
    assert "kept in" not in CliRunner().invoke(group, ["inspect", str(tmp_path / "bundle")]).output


def test_on_the_command_line(dense_checkpoint: Any, tmp_path: Path) -> None:
    arguments = ["-q", "export", str(dense_checkpoint.folder), "-o", str(tmp_path / "b"), "--cache", "int8"]
    assert CliRunner().invoke(group, arguments).exit_code == 0
    assert cache_numbers(tmp_path / "b" / "stage_0.onnx") == "int8"
    refused = CliRunner().invoke(group, [*arguments, "--graph", "stock", "--overwrite"])
    assert isinstance(refused.exception, UsageError) or refused.exit_code == 2
