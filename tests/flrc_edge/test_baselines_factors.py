"""Plain SVD and ASVD factors against cases with a known answer, and against the one-sided optimum on real inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge.baselines.asvd import asvd_factors, channel_means
from flrc_edge.baselines.svd import svd_factors
from flrc_edge.calibration import calibrate
from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors, factorize
from flrc_edge.models import open_model
from flrc_edge.texts import WeightedText, token_windows

SHAPES = [(24, 40), (32, 32), (40, 24)]
STORIES = Path(__file__).parents[1] / "data" / "stories260k"
PROJECTIONS = {
    "model.layers.0.self_attn.q_proj": "m = n",
    "model.layers.1.self_attn.k_proj": "m < n",
    "model.layers.2.mlp.gate_proj": "m > n",
    "model.layers.3.mlp.down_proj": "m < n, wide",
}


@pytest.fixture
def weight(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(*request.param)


def means_of(n: int) -> Tensor:
    """Channel means over three decades."""
    return 10.0 ** torch.linspace(-2, 1, n, dtype=torch.float64)


def product(factors: Factors, rank: int) -> Tensor:
    return factors.U[:, :rank].double() @ factors.V[:rank].double()


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("method", ["svd", "asvd"])
def test_a_matrix_of_rank_k_is_recovered_at_rank_k(method: str, m: int, n: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(m, 7, dtype=torch.float64) @ torch.randn(7, n, dtype=torch.float64)
    factors = svd_factors(weight) if method == "svd" else asvd_factors(weight, means_of(n))
    assert (product(factors, 7) - weight).norm() < 1e-5 * weight.norm()
    assert (product(factors, 6) - weight).norm() > 1e-2 * weight.norm()
    assert factors.metric(7) < 1e-12 * factors.metric(0)


@pytest.mark.parametrize("weight", SHAPES, indirect=True)
def test_the_loss_of_svd_is_the_tail_and_the_error(weight: Tensor) -> None:
    factors = svd_factors(weight)
    values = torch.linalg.svdvals(weight.double())
    k = min(weight.shape)
    assert factors.U.shape == (len(weight), k) and factors.V.shape == (k, weight.shape[1])
    assert torch.allclose(factors.U.norm(dim=0), torch.ones(k), atol=1e-5)
    for rank in (0, 1, k // 2, k - 1):
        tail = values[rank:].square().sum().item()
        error = (weight.double() - product(factors, rank)).square().sum().item()
        assert factors.loss(rank) == factors.metric(rank) == pytest.approx(tail, rel=1e-9)
        assert error == pytest.approx(tail, rel=1e-4)
    assert (product(factors, k) - weight).norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize("weight", SHAPES, indirect=True)
def test_the_loss_of_asvd_is_the_scaled_error(weight: Tensor) -> None:
    means = means_of(weight.shape[1])
    factors = asvd_factors(weight, means)
    scale = means.sqrt() + 1e-6
    assert factors.U.dtype == factors.V.dtype == torch.float32
    for rank in (1, min(weight.shape) // 2):
        error = ((weight.double() - product(factors, rank)) * scale).square().sum().item()
        assert factors.metric(rank) == pytest.approx(error, rel=1e-4)
        plain = ((weight.double() - product(svd_factors(weight), rank)) * scale).square().sum().item()
        assert error < 0.9 * plain


@pytest.mark.parametrize("weight", SHAPES, indirect=True)
def test_asvd_without_scaling_is_svd(weight: Tensor) -> None:
    plain, same = svd_factors(weight), asvd_factors(weight, means_of(weight.shape[1]), alpha=0.0)
    for rank in (1, 5, min(weight.shape)):
        assert torch.allclose(product(same, rank), product(plain, rank), atol=1e-5)
    assert torch.allclose(same.spectrum, plain.spectrum, rtol=1e-4)


def test_asvd_keeps_a_loud_channel_better() -> None:
    torch.manual_seed(1)
    weight = torch.randn(32, 48)
    means = torch.ones(48)
    means[5] = 1e4
    errors = [
        (weight.double() - product(f, 8)).square().sum(0)
        for f in (svd_factors(weight), asvd_factors(weight, means))
    ]
    quiet = [e.sum() - e[5] for e in errors]
    assert errors[1][5] < 1e-2 * errors[0][5] and quiet[1] > quiet[0]


def test_silent_channels_are_no_division_by_zero() -> None:
    torch.manual_seed(1)
    weight, means = torch.randn(16, 24), torch.ones(24)
    means[:20] = 0
    factors = asvd_factors(weight, means)
    assert torch.isfinite(factors.U).all() and torch.isfinite(factors.V).all()
    # Four channels are heard, so rank 4 holds all that these inputs can show.
    assert (product(factors, 4) - weight)[:, 20:].norm() < 1e-5 * weight.norm()
    assert (product(factors, 16) - weight).norm() < 1e-4 * weight.norm()


def test_a_failing_svd_is_an_error_not_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fail)
    for factors in (
        lambda: svd_factors(torch.randn(8, 8), name="a.b"),
        lambda: asvd_factors(torch.randn(8, 8), torch.ones(8), name="a.b"),
    ):
        with pytest.raises(NumericalError, match=r"^a\.b: its SVD did not converge"):
            factors()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    weight, means = torch.randn(8, 12), torch.ones(12)
    weight[0, 0] = value
    for factors in (lambda: svd_factors(weight, name="a.b"), lambda: asvd_factors(weight, means, name="a.b")):
        with pytest.raises(NumericalError, match=r"^a\.b: its weight holds a value that is not finite"):
            factors()
    means[3] = value
    with pytest.raises(NumericalError, match=r"^a\.b: its channel means hold"):
        asvd_factors(torch.randn(8, 12), means, name="a.b")


@pytest.fixture(scope="module")
def real() -> Any:
    """stories260k, windows of real text, and the inputs ``[T, n]`` of some projections on them."""
    loaded = open_model(str(STORIES))
    ids = token_windows(loaded.tokenizer, (WeightedText("austen"),), windows=4, length=128, seed=0).ids
    rows: dict[str, list[Tensor]] = {name: [] for name in PROJECTIONS}
    handles = [
        loaded.model.get_submodule(n).register_forward_hook(
            lambda m, i, o, n=n: rows[n].append(i[0][0].double())
        )
        for n in PROJECTIONS
    ]
    model: Any = loaded.model
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return loaded, ids, {name: torch.cat(r) for name, r in rows.items()}


def test_channel_means_are_those_of_the_inputs(real: Any) -> None:
    loaded, ids, inputs = real
    hooks = [len(m._forward_pre_hooks) for m in loaded.model.modules()]
    seen: list[tuple[str, int, int]] = []
    means = channel_means(loaded.model, list(PROJECTIONS), ids, progress=lambda *step: seen.append(step))
    for name, x in inputs.items():
        assert torch.allclose(means[name], x.abs().mean(0), rtol=1e-5)
    assert seen == [("channel means", i, 4) for i in range(1, 5)]
    assert hooks == [len(m._forward_pre_hooks) for m in loaded.model.modules()]
    assert not any(p.grad is not None for p in loaded.model.parameters())


def test_activations_that_are_not_finite_are_named(real: Any) -> None:
    loaded, ids, _ = real
    token = next(t for t in ids[1].tolist() if t not in ids[0].tolist())
    embedding = loaded.model.get_input_embeddings().weight
    before = embedding[token].detach().clone()
    try:
        with torch.no_grad():
            embedding[token] = float("nan")
        with pytest.raises(
            NumericalError, match=r"^model\.layers\.0\.self_attn\.q_proj: activations .* window 1"
        ):
            channel_means(loaded.model, list(PROJECTIONS), ids)
    finally:
        with torch.no_grad():
            embedding[token] = before
    assert not any(m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("name", PROJECTIONS, ids=PROJECTIONS.values())
def test_no_factors_of_a_rank_lose_less_than_one_sided(real: Any, name: str) -> None:
    """E‖ΔW x‖² on the inputs: the one-sided factors are its optimum, svd, asvd and two-sided are not."""
    loaded, ids, inputs = real
    x, weight = inputs[name], loaded.model.get_parameter(f"{name}.weight").detach()
    moments = calibrate(loaded.model, [name], ids).moments[name]
    means = channel_means(loaded.model, [name], ids)[name]
    best = factorize(weight, moments, method="one-sided")
    others = {
        "svd": svd_factors(weight),
        "asvd": asvd_factors(weight, means),
        "two-sided": factorize(weight, moments, method="two-sided"),
    }

    def lost(factors: Factors, rank: int) -> float:
        return (x @ (weight.double() - product(factors, rank)).T).square().sum(1).mean().item()

    most = best.U.shape[1]
    for rank in (most // 4, most // 2, most):
        for other in others.values():
            assert lost(best, rank) < lost(other, rank)
        assert lost(others["asvd"], rank) < lost(others["svd"], rank)
