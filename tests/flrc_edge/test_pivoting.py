"""Pivoted storage: nothing is lost, the coefficients are small, and what is not finite is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_edge.measurements import measure
from flrc_edge.pivoting import pivot
from flrc_edge.planning import factorize_all

# Of stories260k the largest is 2.3 (o_proj, two-sided), of SmolLM2-135M up to rank 544 1.4.
LARGEST_COEFFICIENT = 4.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(U: Tensor, V: Tensor) -> float:
    """‖pivoted - U V‖ / ‖U V‖, the pivoted product computed in the dtype of V."""
    rows, coefficients, order = pivot(U, V)
    (m, r), n = U.shape, V.shape[1]
    assert rows.shape == (r, n) and coefficients.shape == (m - r, r) and order.shape == (m,)
    assert rows.dtype == coefficients.dtype == V.dtype and order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(m))
    wanted = U.double() @ V.double()
    got = torch.cat([rows, coefficients @ rows])[order].double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=["one-sided", "two-sided"])
def factors(request: pytest.FixtureRequest, compressed_stories: Any) -> Any:
    """Factors of every rank of all 35 projections of stories260k."""
    statistics, _ = measure(compressed_stories.source, compressed_stories.settings)
    return factorize_all(
        compressed_stories.source, statistics.moments, method=request.param, storage="pivoted"
    )


@pytest.mark.parametrize("part", ["first ranks", "last ranks", "all but one", "all"])
def test_real_factors_lose_nothing(factors: Any, part: str) -> None:
    """Of a first chunk, of a second one (whose rows are small), and up to the full rank."""
    for name, f in factors.items():
        full = f.U.shape[1]
        start, stop = {
            "first ranks": (0, full // 2),
            "last ranks": (full // 2, full),
            "all but one": (0, full - 1),
            "all": (0, full),
        }[part]
        u, v = f.U[:, start:stop], f.V[start:stop]
        assert error(u, v) <= 1e-5, name
        _, coefficients, _ = pivot(u, v)
        assert coefficients.numel() == 0 or coefficients.abs().max() <= LARGEST_COEFFICIENT, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "r", "n"), [(6, 6, 9), (9, 6, 6), (6, 6, 6), (12, 1, 5), (1, 1, 4), (4, 1, 1), (40, 30, 35)]
)
def test_every_rank_up_to_the_full_one(m: int, r: int, n: int, dtype: torch.dtype) -> None:
    u, v = normal(m, r), normal(r, n, seed=1)
    assert error(u.to(dtype), v.to(dtype)) <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_any_size(scale: float) -> None:
    u, v = (normal(20, 8) * scale).float(), normal(8, 9, seed=1).float()
    assert error(u, v) <= 1e-5
    assert error(normal(20, 8).float(), v * scale) <= 1e-5


@pytest.mark.parametrize("case", ["few directions", "zero column", "equal columns", "few rows", "nearly"])
def test_u_of_lower_rank(case: str) -> None:
    u = normal(20, 8)
    if case == "few directions":
        u = normal(20, 2) @ normal(2, 8, seed=1)
    elif case == "zero column":
        u[:, 3] = 0
    elif case == "equal columns":
        u[:, 3] = u[:, 5]
    elif case == "few rows":
        u[4:] = 0
    else:
        u[:, 3] = u[:, 5] + 1e-7 * u[:, 3]
    u, v = u.float(), normal(8, 9, seed=2).float()
    assert error(u, v) <= 1e-5
    assert pivot(u, v)[1].abs().max() <= LARGEST_COEFFICIENT


@pytest.mark.parametrize("zero", ["U", "V"])
def test_nothing_at_all(zero: str) -> None:
    u, v = normal(6, 3).float(), normal(3, 9).float()
    (u if zero == "U" else v).zero_()
    rows, coefficients, order = pivot(u, v)
    assert not torch.cat([rows, coefficients @ rows])[order].any() and torch.isfinite(coefficients).all()


def test_known_answer() -> None:
    """Row 2 is by far the largest and is the pivot; the others are its multiples."""
    u, v = torch.tensor([[1.0], [-2.0], [8.0]]), torch.tensor([[3.0, 5.0]])
    rows, coefficients, order = pivot(u, v)
    assert torch.allclose(rows, torch.tensor([[24.0, 40.0]]))
    made = dict(zip(order.tolist(), (u / 8)[:, 0].tolist(), strict=True))
    assert order[2] == 0
    assert torch.allclose(coefficients[:, 0], torch.tensor([made[1], made[2]]))


def test_pivots_are_chosen_to_keep_coefficients_small() -> None:
    """The first rows would do, with coefficients a thousand times as large."""
    u = normal(20, 4)
    u[:4] *= 1e-3
    first = torch.linalg.solve(u[:4].T, u[4:].T)
    _, coefficients, _ = pivot(u, normal(4, 9, seed=1))
    assert first.abs().max() > 100 and coefficients.abs().max() <= 1.5


@pytest.mark.parametrize("where", ["U", "V"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(where: str, value: float) -> None:
    u, v = normal(6, 3), normal(3, 9)
    (u if where == "U" else v)[1, 2] = value
    with pytest.raises(NumericalError, match=r"^a.b: a factor holds a value that is not finite"):
        pivot(u, v, name="a.b")
