"""One small random model per family: grouped heads, biases, qk-norm, odd head sizes, windows, layer types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import flrc_runtime
from flrc_exporters.bundle import export

COMMON = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA_ROPE = {
    FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=False, rope_parameters=LLAMA3),
    "llama-bias": LlamaConfig(**COMMON, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**COMMON, head_dim=32, sliding_window=24),
    "qwen2": Qwen2Config(
        **{**COMMON, "hidden_size": 64}, use_sliding_window=True, sliding_window=20, max_window_layers=2
    ),
    "qwen2-tied": Qwen2Config(**{**COMMON, "hidden_size": 64}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=48, tie_word_embeddings=True),
    "gemma3_text": Gemma3TextConfig(
        **COMMON,
        head_dim=32,
        sliding_window=17,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING],
        query_pre_attn_scalar=24,
        rope_parameters=GEMMA_ROPE,
    ),
}


def random_model(config: PreTrainedConfig) -> Any:
    """Weights large enough that attention is not flat and every part moves the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.5 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.3
            p.copy_(torch.randn_like(p) * scale + (1.0 if "norm" in name and p.ndim == 1 else 0.0))
    return model


def nested(name: str, shape: tuple[int, int]) -> tuple[int | None, ...]:
    kind = name.rpartition(".")[2]
    full = min(shape)
    if kind == "q_proj" or name.startswith("model.layers.3"):
        return (None, None)
    if name.startswith("model.layers.2") and kind in ("v_proj", "down_proj"):
        return (full, full)  # pivoted, nothing but rows of the matrix
    return (full, full - 7) if kind in ("k_proj", "down_proj", "up_proj") else (full - 3, full - 3)


PLAIN = [(name, "plain") for name in FAMILIES]
PIVOTED = [(name, "pivoted") for name in FAMILIES]
WITH_BIAS = [
    ("llama-bias", "pivoted"),
    ("qwen2", "pivoted"),
]  # what pivoting does depends on no more of a family
fewer = pytest.mark.parametrize("family", PLAIN + WITH_BIAS, ids="-".join, indirect=True)


@pytest.fixture(scope="module", params=PLAIN + PIVOTED, ids="-".join)
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Any],
) -> tuple[Any, Path]:
    name, storage = request.param
    folder = tmp_path_factory.mktemp(name)
    model = random_model(FAMILIES[name])
    checkpoint = make_checkpoint(folder / "ckpt", model, nested, stages=2, storage=storage)
    return checkpoint, folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 512, (128,), generator=torch.Generator().manual_seed(1))


def test_every_stage_equals_torch(family: tuple[Any, Path], ids: torch.Tensor, open_stage: Any) -> None:
    checkpoint, folder = family
    export(checkpoint.folder, folder / "bundle", dtype="fp32")
    for stage in range(2):
        wanted = checkpoint.stage_logits(ids, stage)
        bound = max(1e-3, 5e-5 * float(np.abs(wanted).max()))
        graph = folder / "bundle" / f"stage_{stage}.onnx"
        assert np.abs(open_stage(graph).run(ids) - wanted).max() <= bound
        assert np.abs(open_stage(graph).forced(ids, 40) - wanted).max() <= bound


@fewer
def test_static_stages_equal_torch(family: tuple[Any, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    """Graphs of fixed shapes: windows, rotary kinds, norms and biases of every family, across moves of stage."""
    checkpoint, _ = family
    export(checkpoint.folder, tmp_path / "static", prefill=16, context=64)
    export(checkpoint.folder, tmp_path / "fused", dtype="fp32", context=64)
    model = flrc_runtime.load(tmp_path / "static", threads=1)
    some = ids[:64].tolist()
    for stage in range(2):
        wanted = checkpoint.stage_logits(ids[:64], stage)
        bound = max(1e-3, 5e-5 * float(np.abs(wanted).max()))
        assert np.abs(model.logits(some, stages=stage) - wanted).max() <= bound
        for length in (1, 15, 16, 17, 64):
            decoder = model.decoder()
            assert np.abs(decoder.prefill(some[:length], stage) - wanted[length - 1]).max() <= bound
            decoder.close()
    stages = [i // 5 % 2 for i in range(64)]
    fused = flrc_runtime.load(tmp_path / "fused", threads=1).logits(some, stages=stages)
    assert np.abs(model.logits(some, stages=stages) - fused).max() <= bound


@fewer
def test_integer_graphs_hold_what_the_runtime_takes(family: tuple[Any, Path], tmp_path: Path) -> None:
    """Operators of every family, which export compares with those that the runtime lets onnxruntime see."""
    checkpoint, _ = family
    for dtype in ("int4", "int8"):
        export(checkpoint.folder, tmp_path / dtype, dtype=dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_export_equals_hugging_face(
    name: str, ids: torch.Tensor, open_stage: Any, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    model = random_model(FAMILIES[name])
    dense = make_checkpoint(tmp_path / "dense", model, lambda name, shape: (None,))
    export(dense.folder, tmp_path / "bundle", dtype="fp32")
    with torch.no_grad():
        wanted = model(input_ids=ids[None]).logits[0].numpy()
    got = open_stage(tmp_path / "bundle" / "stage_0.onnx").forced(ids, 40)
    assert np.abs(got - wanted).max() <= max(1e-3, 5e-5 * float(np.abs(wanted).max()))


@fewer
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integer_stages_run_what_was_rounded(
    dtype: Any, family: tuple[Any, Path], ids: torch.Tensor, open_stage: Any
) -> None:
    """With float activations the stock graph equals torch with rounded weights: no tensor is misplaced.

    Our own operators round activations to int8, which differs by as much as that costs.
    """
    from flrc_exporters.number_format import NumberFormat, dequantize, quantize
    from flrc_exporters.refit import refitted

    checkpoint, folder = family
    export(checkpoint.folder, folder / dtype, dtype=dtype, accuracy_level=0, stock=True)
    export(checkpoint.folder, folder / f"own-{dtype}", dtype=dtype)
    bits = 8 if dtype == "int8" else 4

    def rounded(weight: torch.Tensor, bits: Any = bits) -> torch.Tensor:
        packed, scales = quantize(weight.float().numpy(), bits)
        return torch.from_numpy(dequantize(packed, scales, weight.shape[1]).copy())

    def product_of(chunk: Any) -> torch.Tensor:
        rows = rounded(chunk.V)
        if chunk.order is None:
            return rounded(chunk.U) @ rows
        number_format = NumberFormat(bits)
        u = torch.from_numpy(refitted(chunk.U.numpy(), chunk.V.numpy(), number_format))
        others = rounded(u, 8) @ rows if len(u) else u @ rows
        return torch.cat([rows, others])[chunk.order]

    saved = {name: p.detach().clone() for name, p in checkpoint.model.named_parameters()}
    try:
        for plan in checkpoint.plan.projections:
            linear = checkpoint.model.get_submodule(plan.name)
            if plan.dense:
                linear.weight.data = rounded(linear.weight.data)
            else:
                linear.weight.data = sum(map(product_of, checkpoint.chunks[plan.name]))
        embedding = checkpoint.model.get_input_embeddings()
        embedding.weight.data = rounded(embedding.weight.data)
        if not checkpoint.model.config.tie_word_embeddings:
            checkpoint.model.lm_head.weight.data = rounded(checkpoint.model.lm_head.weight.data)
        with torch.no_grad():
            wanted = checkpoint.model(input_ids=ids[None]).logits[0].numpy()
    finally:
        for name, value in saved.items():
            checkpoint.model.get_parameter(name).data = value
    got = open_stage(folder / dtype / "stage_0.onnx").forced(ids, 40)
    assert np.abs(got - wanted).max() <= max(1e-3, 5e-5 * float(np.abs(wanted).max()))
    own = open_stage(folder / f"own-{dtype}" / "stage_0.onnx").forced(ids, 40)
    assert np.linalg.norm(own - wanted) < 0.1 * np.linalg.norm(wanted)


@fewer
def test_last_stage_gives_the_same_tokens_in_genai(
    family: tuple[Any, Path], ids: torch.Tensor, open_stage: Any, genai_greedy: Any
) -> None:
    checkpoint, folder = family
    export(checkpoint.folder, folder / "genai", dtype="fp32", stock=True)
    got = genai_greedy(folder / "genai", 1, ids[:40].tolist(), 64)
    wanted = open_stage(folder / "genai" / "stage_1.onnx").greedy(ids[:40], 64)
    assert got and got == wanted[: len(got)]
    assert len(got) == 64 or got[-1] == 2
