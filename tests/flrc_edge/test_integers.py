"""Compensated integers, from one matrix to a checkpoint, its export and the torch model it loads as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flrc_edge
import flrc_runtime
from flrc_edge.compression import compress
from flrc_edge.errors import NumericalError
from flrc_edge.input_grams import weighted_grams
from flrc_edge.measurements import calibration_windows
from flrc_edge.quantization import quantize_compensated, round_to_nearest
from flrc_edge.quantized_factors import fitted, product, quantize_projection, rotation
from flrc_exporters.bundle import export
from flrc_exporters.number_format import NumberFormat
from flrc_runtime.errors import UsageError
from flrc_runtime.manifest import ProjectionPlan, read

INT4, INT8 = NumberFormat.named("int4"), NumberFormat.named("int8")
NAME = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def gram(compressed_stories: Any) -> torch.Tensor:
    loaded = compressed_stories.source
    ids = calibration_windows(loaded, compressed_stories.settings).ids
    return weighted_grams(loaded.model, [NAME], ids)[NAME]


def error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    change = (weight - other).double()
    return ((change @ gram.double()) * change).sum().item()


def test_weighted_gram_by_brute_force(compressed_stories: Any, whole_backward: Any) -> None:
    loaded = compressed_stories.source
    ids = calibration_windows(loaded, compressed_stories.settings).ids[:2]
    module, seen = loaded.model.get_submodule(NAME), {}
    handles = [
        module.register_forward_hook(lambda _, i, o: seen.update(x=i[0][0].detach())),
        module.register_full_backward_hook(lambda _, __, g: seen.update(g=g[0][0].detach())),
    ]
    module.weight.requires_grad_(True)
    total, weight = torch.zeros(module.in_features, module.in_features, dtype=torch.float64), 0.0
    for i, window in enumerate(ids):
        whole_backward(loaded.model, window, labels="sampled", seed=i)
        size = seen["g"].double().square().sum(1)
        total += (seen["x"].double() * size[:, None]).T @ seen["x"].double()
        weight += size.sum().item()
    module.weight.requires_grad_(False)
    module.weight.grad = None
    for handle in handles:
        handle.remove()
    found = weighted_grams(loaded.model, [NAME], ids)[NAME]
    assert torch.allclose(found.double(), total / weight, rtol=1e-3, atol=1e-6 * total.max().item() / weight)


@pytest.mark.parametrize("number_format", [INT4, INT8], ids=["int4", "int8"])
def test_compensation_beats_rounding_to_nearest_on_real_inputs(
    compressed_stories: Any, gram: torch.Tensor, number_format: NumberFormat
) -> None:
    weight = compressed_stories.source.model.get_parameter(f"{NAME}.weight").detach()
    ours = quantize_compensated(weight, gram, number_format).dequantize()
    nearest = round_to_nearest(weight, number_format).dequantize()
    assert error(weight, ours, gram) < 0.7 * error(weight, nearest, gram)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    ours = quantize_compensated(weight, torch.eye(64), INT4, sweeps=0).dequantize()
    assert torch.equal(ours, round_to_nearest(weight, INT4).dequantize())


def test_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="q_proj"):
        quantize_compensated(torch.ones(4, 32), torch.full((32, 32), float("nan")), INT4, name="q_proj")


def test_a_refitted_factor_solves_the_normal_equations(gram: torch.Tensor, compressed_stories: Any) -> None:
    weight = compressed_stories.source.model.get_parameter(f"{NAME}.weight").detach().double()
    v = torch.randn(16, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = gram.double()
    u = fitted(weight, v, g, v @ g @ v.T)
    left = (weight - u @ v) @ g @ v.T
    assert left.abs().max() < 1e-4 * (weight @ g @ v.T).abs().max()


def test_rotation_is_orthogonal_and_always_the_same() -> None:
    assert torch.allclose(rotation(24) @ rotation(24).T, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rotation(24), rotation(24))


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_a_later_chunk_mends_the_first(compressed_stories: Any, gram: torch.Tensor, storage: Any) -> None:
    """With both chunks the error is smaller than what the float factors alone would add to the first one's."""
    from flrc_edge.chunks import chunks_of

    weight = compressed_stories.source.model.get_parameter(f"{NAME}.weight").detach()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    plan = ProjectionPlan(NAME, tuple(weight.shape), (48, 32), storage, ("int4/32",) * 4)  # type: ignore[arg-type]
    chunks = chunks_of(u[:, :48], s[:48, None] * vt[:48], plan)
    result = quantize_projection(weight, plan, chunks, gram)
    assert set(result.integers) == set(plan.matrices())
    first, both = product(result.chunks[0]), product(result.chunks[0]) + product(result.chunks[1])
    assert error(weight, both, gram) < 0.8 * error(weight, first, gram)
    alone = quantize_projection(weight - product(chunks[0]), replace(plan, ranks=(16, 16), formats=plan.formats[:2]),
                                chunks[1:], gram)  # fmt: skip
    assert error(weight, both, gram) < error(weight, first + product(alone.chunks[0]), gram)


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "mixed"])
def test_checkpoint_and_bundle_hold_the_same_integers(
    compressed_stories: Any, tmp_path: Path, storage: Any, dtype: Any
) -> None:
    settings = replace(
        compressed_stories.settings,
        keep=(0.95, 0.8),
        sizes=(270_000, 230_000) if dtype == "mixed" else (),
        boundaries=(8,),
        storage=storage,
        dtype=dtype,
    )
    written = compress(compressed_stories.source, tmp_path / "checkpoint", settings)
    assert written is not None and written.dtype == dtype
    formats = {f for p in written.plan.projections for f in p.formats}
    if dtype == "mixed":
        assert len(formats) > 1
    else:
        finer = {"int8/32"} if storage == "pivoted" else set()  # the coefficients of pivoted chunks
        assert formats == {f"{dtype}/32"} | finer
    assert dtype == "mixed" or written.plan.embedding == "int8/32"
    with pytest.raises(UsageError, match="as they are"):
        export(tmp_path / "checkpoint", tmp_path / "no", dtype="int8")
    export(tmp_path / "checkpoint", tmp_path / "bundle", accuracy_level=0, stock=True)
    assert read(tmp_path / "bundle").dtype == dtype
    ids = list(range(3, 60))
    bundle = flrc_runtime.load(tmp_path / "bundle")
    for stage in range(2):
        model = flrc_edge.load(tmp_path / "checkpoint", stage=stage)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(bundle.logits(ids, stages=stage) - expected).max() < 1e-3


def test_compensated_int4_is_nearer_to_the_float_checkpoint(compressed_stories: Any, tmp_path: Path) -> None:
    from flrc_edge.evaluation.bundle_perplexity import bundle_logits
    from flrc_edge.evaluation.perplexity import torch_logits

    settings = replace(
        compressed_stories.settings, keep=(0.9,), boundaries=None, storage="pivoted", rank_step=32
    )
    ids = calibration_windows(compressed_stories.source, replace(settings, seed=1)).ids[:6]
    for dtype in ("float", "int4"):
        compress(compressed_stories.source, tmp_path / dtype, replace(settings, dtype=dtype))  # type: ignore[arg-type]
    export(tmp_path / "float", tmp_path / "nearest", dtype="int4", head="int8", accuracy_level=0)
    floats, ours = (torch_logits(flrc_edge.load(tmp_path / dtype)) for dtype in ("float", "int4"))
    nearest = bundle_logits(flrc_runtime.load(tmp_path / "nearest"), 0)

    def divergence(logits: Any) -> float:
        kls = []
        for row in ids:
            p, q = (of(row[None]).double().log_softmax(-1) for of in (floats, logits))
            kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return sum(kls) / len(kls)

    with torch.no_grad():
        added, added_by_nearest = divergence(ours), divergence(nearest)
    assert added < 0.8 * added_by_nearest  # of 64 inputs; of SmolLM2-135M a third
