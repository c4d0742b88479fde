"""Error-compensated rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flrc_edge.errors import NumericalError
from flrc_edge.models import open_model
from flrc_edge.quantization import QuantizedMatrix, damped, quantize_compensated, round_to_nearest
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.number_format import NumberFormat

FORMATS = ["int8/32", "int4/32", "int4/64", "int2/128"]


def correlated(n: int, tokens: int = 2000, *, seed: int = 0) -> Tensor:
    """Inputs ``[tokens, n]`` whose features have to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator)
    return torch.randn(tokens, n, generator=generator) @ mixing


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(weight: Tensor, rounded: QuantizedMatrix, gram: Tensor) -> float:
    error = (weight - rounded.dequantize()).double()
    return float(((error @ gram.double()) * error).sum())


def best_error(row: Tensor, scale: float, gram: Tensor) -> float:
    """The least weighted error of a row of 4 entries over all integers of 2 bits, at one scale."""
    grid = torch.cartesian_prod(*[torch.arange(-2.0, 2.0)] * len(row)) * scale
    error = (row - grid).double()
    return float(((error @ gram) * error).sum(1).min())


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_without_correlation_leave_nothing_to_compensate(name: str) -> None:
    weight, number_format = random(40, 172), NumberFormat.named(name)
    wanted = round_to_nearest(weight, number_format)
    found = quantize_compensated(weight, 3.0 * torch.eye(172), number_format, sweeps=0)
    assert torch.equal(found.packed, wanted.packed)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_correlated_inputs_leave_much_less_error(name: str, sweeps: int) -> None:
    x = correlated(172)
    gram, weight, number_format = x.T @ x / len(x), random(40, 172), NumberFormat.named(name)
    found = quantize_compensated(weight, gram, number_format, damping=1e-3, sweeps=sweeps)
    assert loss(weight, found, gram) < 0.65 * loss(weight, round_to_nearest(weight, number_format), gram)


def test_sweeps_lower_the_error_further() -> None:
    x = correlated(96)
    gram, weight, number_format = x.T @ x / len(x), random(40, 96), NumberFormat.named("int2/32")
    errors = [
        loss(weight, quantize_compensated(weight, gram, number_format, damping=1e-6, sweeps=s), gram)
        for s in (0, 1, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_four_entries_come_close_to_the_best_integers() -> None:
    """Brute force over all 256 integer vectors at the chosen scale: compensation finds most of the optimum."""
    x = correlated(4, seed=3)
    gram, weight, number_format = (
        (x.T @ x / len(x)).double(),
        random(200, 4, seed=4),
        NumberFormat.named("int2"),
    )
    found = quantize_compensated(weight, gram, number_format, damping=1e-9, sweeps=0)
    plain = round_to_nearest(weight, number_format)
    best = sum(best_error(row, float(s), gram) for row, s in zip(weight, found.scales[:, 0], strict=True))
    reached, nearest = loss(weight, found, gram), loss(weight, plain, gram)
    assert best <= reached * (1 + 1e-6)
    assert reached < best + 0.35 * (nearest - best)


def test_what_the_integers_stand_for() -> None:
    number_format = NumberFormat.named("int4")
    packed = torch.full((1, 1, 16), 0x88, dtype=torch.uint8)
    packed[0, 0, 0] = 0x1F  # entry 0 is 15 - 8, entry 1 is 1 - 8
    matrix = QuantizedMatrix(packed, torch.tensor([[0.5]]), 20, number_format)
    wanted = torch.zeros(1, 20)
    wanted[0, 0], wanted[0, 1] = 3.5, -3.5
    assert torch.equal(matrix.dequantize(), wanted)


@pytest.mark.parametrize("width", [32, 20, 172])
@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_on_the_grid_is_kept(name: str, width: int) -> None:
    """Integers times one scale are found again, whatever the order of rounding, also in a padded last block."""
    number_format = NumberFormat.named(name)
    half = 1 << (number_format.bits - 1)
    least = -half if number_format.bits < 8 else 1 - half
    q = torch.randint(least, half, (24, width), generator=torch.Generator().manual_seed(0)).float()
    q[:, :: number_format.block_size] = least  # the peak of every block
    x = correlated(width)
    found = quantize_compensated(q * 0.25, x.T @ x, number_format)
    assert found.packed.shape == number_format.packed_shape(24, width)
    torch.testing.assert_close(found.dequantize(), q * 0.25)


def test_rows_do_not_depend_on_each_other() -> None:
    x = correlated(64)
    weight, gram, number_format = random(10, 64), x.T @ x, NumberFormat.named("int4")
    whole = quantize_compensated(weight, gram, number_format)
    part = quantize_compensated(weight[3:4], gram, number_format)
    assert torch.equal(whole.packed[3:4], part.packed)


def test_damping_is_a_share_of_the_median_energy() -> None:
    gram = torch.diag(torch.tensor([1.0, 2.0, 1000.0]))
    assert torch.allclose(damped(gram, 0.5).diagonal(), torch.tensor([2.0, 3.0, 1001.0]).double())


def test_dead_inputs_are_rounded_to_nearest() -> None:
    """An input that is always zero has no say; a Gram matrix of zeros is that of equal inputs."""
    weight, number_format = random(8, 64), NumberFormat.named("int4")
    nearest = round_to_nearest(weight, number_format)
    assert torch.equal(
        quantize_compensated(weight, torch.zeros(64, 64), number_format, sweeps=0).packed, nearest.packed
    )


@pytest.mark.parametrize("damage", ["weight", "gram"])
def test_values_that_are_not_finite_are_refused(damage: str) -> None:
    weight, gram = random(8, 32), torch.eye(32)
    (weight if damage == "weight" else gram)[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="gate"):
        quantize_compensated(weight, gram, NumberFormat.named("int4"), name="gate")


def test_real_activations(stories: Path) -> None:
    """Every matrix of a layer of stories260k, on inputs of text it was not rounded for."""
    loaded = open_model(str(stories))
    ids = token_windows(loaded.tokenizer, (WeightedText("austen"),), windows=8, length=128, seed=0).ids
    names = [p.name for p in loaded.config.projections() if ".layers.2." in p.name]
    inputs: dict[str, Tensor] = {}
    for name in names:
        loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: inputs.__setitem__(name, x[0].detach().flatten(0, 1))
        )
    with torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    number_format = NumberFormat.named("int4")
    errors = torch.zeros(2, dtype=torch.float64)
    for name in names:
        fit, other = inputs[name].split(len(inputs[name]) // 2)
        weight = loaded.model.get_parameter(f"{name}.weight").detach()
        found = quantize_compensated(weight, fit.T @ fit / len(fit), number_format)
        nearest = round_to_nearest(weight, number_format)
        gram = other.T @ other / len(other)
        both = torch.tensor([loss(weight, found, gram), loss(weight, nearest, gram)])
        assert both[0] < both[1], name
        errors += both / both[1]
    assert errors[0] < 0.8 * errors[1]
