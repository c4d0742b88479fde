"""What the factors promise, measured on the activations and gradients they were fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge.calibration import Moments, calibrate
from flrc_edge.errors import NumericalError, UsageError
from flrc_edge.factorization import DAMPING, INPUT_DAMPING, Factors, break_even, factorize
from flrc_edge.models import LoadedModel, open_model
from flrc_edge.pivoting import pivot

SHAPES = {
    "model.layers.0.self_attn.q_proj": "m = n",
    "model.layers.1.self_attn.k_proj": "m < n",
    "model.layers.2.mlp.gate_proj": "m > n",
    "model.layers.3.mlp.down_proj": "m < n, wide",
}


@pytest.fixture(scope="module")
def real() -> Any:
    """Weights, moments, inputs and output gradients of stories260k on real text, by projection."""
    from pathlib import Path

    from torch.nn import functional as F

    from flrc_edge.texts import WeightedText, token_windows

    stories = Path(__file__).parents[1] / "data" / "stories260k"
    loaded: LoadedModel = open_model(str(stories))
    ids = token_windows(loaded.tokenizer, (WeightedText("austen"),), windows=4, length=128, seed=0).ids
    moments = calibrate(loaded.model, list(SHAPES), ids, labels="text").moments
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in SHAPES}

    def keep(module: Any, inputs: Any, output: Tensor, name: str = "") -> None:
        rows[name][0].append(inputs[0][0].detach().double())
        output.register_hook(lambda g: rows[name][1].append(g[0].double()))

    handles = [
        loaded.model.get_submodule(n).register_forward_hook(
            lambda m, i, o, n=n: keep(m, i, o, n)  # type: ignore[misc]
        )
        for n in SHAPES
    ]
    model: Any = loaded.model
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, window[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    weights = {n: loaded.model.get_parameter(f"{n}.weight").detach() for n in SHAPES}
    return {n: (weights[n], moments[n], torch.cat(rows[n][0]), torch.cat(rows[n][1])) for n in SHAPES}


both_storages = pytest.mark.parametrize("storage", ["plain", "pivoted"])


def difference(weight: Tensor, factors: Factors, rank: int) -> Tensor:
    return weight.double() - factors.U[:, :rank].double() @ factors.V[:rank].double()


def ranks_of(weight: Tensor, storage: Any = "plain") -> list[int]:
    most = break_even(tuple(weight.shape), storage=storage)  # type: ignore[arg-type]
    return [1, most // 3, most // 2, most]


@both_storages
@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_one_sided_loss_is_the_measured_one(real: Any, name: str, storage: Any) -> None:
    weight, moments, x, _ = real[name]
    factors = factorize(weight, moments, method="one-sided", storage=storage)
    for rank in ranks_of(weight, storage):
        measured = (x @ difference(weight, factors, rank).T).square().sum(1).mean().item()
        assert factors.metric(rank) == pytest.approx(measured, rel=1e-4)
    assert factors.metric(0) == pytest.approx((x @ weight.double().T).square().sum(1).mean().item(), rel=1e-4)


@both_storages
@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_two_sided_loss_is_the_measured_one(real: Any, name: str, storage: Any) -> None:
    """½ mean over tokens t, s of w_s (g_tᵀ ΔW x_s)², plus what the dampings of H (and, if tall, of C) add.

    w_s is half 1 and half the share of the gradients' energy that token s has.
    """
    weight, moments, x, g = real[name]
    m, n = weight.shape
    x = mixed(x, g)
    factors = factorize(weight, moments, method="two-sided", storage=storage)
    delta = DAMPING * g.square().sum(1).mean().item() / m
    epsilon = INPUT_DAMPING * x.square().mean().item() if m > n else 0.0
    assert factors.loss_scale == 0.5
    for rank in ranks_of(weight, storage):
        d = difference(weight, factors, rank)
        kronecker = (g @ d @ x.T).square().mean().item()
        damping = delta * (x @ d.T).square().sum(1).mean().item()
        inputs = epsilon * ((g @ d).square().sum(1).mean().item() + delta * d.square().sum().item())
        assert factors.loss(rank) == pytest.approx(0.5 * (kronecker + damping + inputs), rel=1e-4)
        assert damping > 0.001 * kronecker and inputs < 0.01 * kronecker  # the terms are no formality


def mixed(x: Tensor, g: Tensor) -> Tensor:
    """Return inputs ``[T, n]`` whose plain second moment is the one that two-sided factors are fitted to."""
    size = g.square().sum(1)
    return x * ((1 + size / size.mean()) / 2).sqrt()[:, None]


@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_one_sided_is_the_optimum_of_svd_llm(real: Any, name: str) -> None:
    """SVD-LLM: the SVD of W L with C = L Lᵀ; the loss of rank r is the sum of the squared tail."""
    weight, moments, x, _ = real[name]
    c = x.T @ x / len(x)
    c += 1e-12 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(c))
    factors = factorize(weight, moments, method="one-sided")
    for rank in ranks_of(weight):
        assert factors.metric(rank) == pytest.approx(values[rank:].square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_two_sided_is_better_where_it_counts(real: Any, name: str) -> None:
    weight, moments, x, g = real[name]
    one, two = (factorize(weight, moments, method=m) for m in ("one-sided", "two-sided"))  # type: ignore[arg-type]
    rank = ranks_of(weight)[2]
    by_output, by_loss = [], []
    for factors in (one, two):
        d = difference(weight, factors, rank)
        by_output.append((x @ d.T).square().sum().item())
        by_loss.append((g @ d @ mixed(x, g).T).square().mean().item())
    assert by_output[0] < by_output[1] and by_loss[1] < by_loss[0]


def moments_of(m: int, n: int, x: Tensor, g: Tensor, weight: Tensor) -> Moments:
    """Moments from inputs [T, n] and output gradients [T, m] as calibration would measure them."""
    x, g, weight = x.double(), g.double(), weight.double()
    first, second = (x @ weight.T, g) if m <= n else (x, g @ weight)
    trace = g.square().sum().item() / len(g)
    return Moments(first.T @ first / len(x), second.T @ second / len(g), trace, 1.0, 1.0)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_identity_grams_give_the_plain_svd(m: int, n: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(m, n, dtype=torch.float64)
    energy = weight @ weight.T if m <= n else torch.eye(n, dtype=torch.float64)
    gradient = torch.eye(m, dtype=torch.float64) if m <= n else weight.T @ weight
    factors = factorize(weight, Moments(energy, gradient, float(m), 1.0, 1.0), damping=0.0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(factors.spectrum, s.square(), rtol=1e-5)
    for rank in range(1, break_even((m, n)) + 1):
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (difference(weight, factors, rank) - (weight - expected)).norm() < 1e-5 * weight.norm()


@both_storages
@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_shapes_unit_columns_and_falling_loss(real: Any, name: str, method: Any, storage: Any) -> None:
    weight, moments, *_ = real[name]
    m, n = weight.shape
    factors = factorize(weight, moments, method=method, storage=storage)
    rank = min(m, n) if storage == "pivoted" else break_even((m, n))
    assert factors.U.shape == (m, rank) and factors.V.shape == (rank, n)
    assert factors.U.dtype == factors.V.dtype == torch.float32
    assert factors.U.is_contiguous() and factors.V.is_contiguous()
    assert torch.allclose(factors.U.norm(dim=0), torch.ones(rank), atol=1e-5)
    losses = [factors.loss(r) for r in range(min(m, n) + 1)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0.0 < losses[0]
    assert len(factors.spectrum) == min(m, n)


@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_pivoted_factors_go_on_to_the_matrix_itself(real: Any, name: str, method: Any) -> None:
    """Those of plain storage are their beginning, and all of them are the weight."""
    weight, moments, *_ = real[name]
    plain = factorize(weight, moments, method=method)
    factors = factorize(weight, moments, method=method, storage="pivoted")
    rank = plain.U.shape[1]
    assert torch.equal(factors.U[:, :rank], plain.U) and torch.equal(factors.V[:rank], plain.V)
    assert torch.equal(factors.spectrum, plain.spectrum)
    assert difference(weight, factors, min(weight.shape)).norm() < 1e-5 * weight.norm()


@both_storages
@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
@pytest.mark.parametrize("name", SHAPES, ids=SHAPES.values())
def test_every_prefix_is_optimal(real: Any, name: str, method: Any, storage: Any) -> None:
    """Nested: the prefix of rank r loses what the best factors of rank r lose, whichever basis they have."""
    weight, moments, x, g = real[name]
    m = len(weight)
    factors = factorize(weight, moments, method=method, storage=storage)
    h = torch.eye(m, dtype=torch.float64)
    if method == "two-sided":
        h = g.T @ g / len(g)
        h += DAMPING * h.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(h)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    x = mixed(x, g) if method == "two-sided" else x
    c = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(c)
    best = torch.linalg.svdvals(
        root @ weight.double() @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    ).square()
    for rank in ranks_of(weight, storage):
        d = difference(weight, factors, rank)
        lost = torch.trace(h @ d @ c @ d.T).item()
        assert lost == pytest.approx(best[rank:].sum().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (32, 32), (40, 24)])
@pytest.mark.parametrize("case", ["few tokens", "no activation", "no gradient", "nothing", "zero weight"])
@both_storages
def test_degenerate_statistics_stay_finite(method: Any, m: int, n: int, case: str, storage: Any) -> None:
    torch.manual_seed(1)
    weight, x, g = torch.randn(m, n), torch.randn(200, n), torch.randn(200, m)
    if case == "few tokens":
        x, g = x[:5], g[:5]
    if case in ("no activation", "nothing"):
        x = torch.zeros_like(x)
    if case in ("no gradient", "nothing"):
        g = torch.zeros_like(g)
    if case == "zero weight":
        weight = torch.zeros_like(weight)
    factors = factorize(weight, moments_of(m, n, x, g, weight), method=method, storage=storage)
    for tensor in (factors.U, factors.V, factors.spectrum):
        assert torch.isfinite(tensor).all()
    assert factors.V.abs().max() < 1e4
    losses = [factors.loss(r) for r in range(min(m, n) + 1)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    if case == "few tokens":  # five directions hold everything these tokens can show
        error = x.double() @ difference(weight, factors, 5).T
        assert error.norm() < 1e-2 * (x @ weight.T).norm()
    if case == "no gradient":  # no gradient was seen, so no loss is predicted; the factors still fit
        assert losses[0] == 0
        assert (difference(weight, factors, break_even((m, n)))).norm() < weight.norm()


@pytest.mark.parametrize("where", ["weight", "energy", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(where: str, value: float) -> None:
    weight = torch.randn(8, 12)
    moments = moments_of(8, 12, torch.randn(50, 12), torch.randn(50, 8), weight)
    if where == "weight":
        weight[0, 0] = value
    else:
        bad = getattr(moments, where).clone()
        bad[0, 0] = value
        moments = replace(moments, **{where: bad})
    with pytest.raises(NumericalError, match=f"^a.b: its {where} holds a value that is not finite"):
        factorize(weight, moments, name="a.b")


@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
def test_eigenvalues_that_do_not_converge(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    weight = torch.randn(8, 12)
    moments = moments_of(8, 12, torch.randn(50, 12), torch.randn(50, 8), weight)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(NumericalError, match=r"^a\.b: the eigenvalues of its statistics did not converge"):
        factorize(weight, moments, name="a.b", method=method)


def test_gradient_trace_not_finite() -> None:
    weight = torch.randn(8, 12)
    moments = moments_of(8, 12, torch.randn(50, 12), torch.randn(50, 8), weight)
    with pytest.raises(NumericalError, match="gradient trace"):
        factorize(weight, replace(moments, gradient_trace=float("nan")))


def test_unknown_method() -> None:
    weight = torch.randn(8, 12)
    moments = moments_of(8, 12, torch.randn(50, 12), torch.randn(50, 8), weight)
    with pytest.raises(UsageError, match=r"factorization 'svd' is not one of one-sided, two-sided"):
        factorize(weight, moments, method="svd")  # type: ignore[arg-type]


def test_a_full_rank_of_few_tokens_still_pivots() -> None:
    """Directions that no token showed have factors of their own size; the product of both forms is the same."""
    torch.manual_seed(2)
    for m, n in ((24, 40), (40, 24)):
        weight, x, g = torch.randn(m, n), torch.randn(5, n), torch.randn(5, m)
        for method in ("one-sided", "two-sided"):
            moments = moments_of(m, n, x, g, weight)
            f = factorize(weight, moments, method=method, storage="pivoted")  # type: ignore[arg-type]
            rows, coefficients, order = pivot(f.U, f.V)
            got = torch.cat([rows, coefficients @ rows])[order]
            assert (got - f.U @ f.V).norm() <= 1e-4 * weight.norm()


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (7, 3), (1, 1), (2, 2)])
def test_break_even(shape: tuple[int, int]) -> None:
    m, n = shape
    rank = break_even(shape)
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)
