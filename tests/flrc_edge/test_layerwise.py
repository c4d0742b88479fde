"""The walk through the layers and input correction, on a real model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flrc_edge.correction import correct, corrected
from flrc_edge.factorization import Factors
from flrc_edge.input_grams import weighted_grams
from flrc_edge.integers import quantize_model, with_formats
from flrc_edge.layerwise import GroupInputs, walk
from flrc_edge.measurements import calibration_windows, measure
from flrc_edge.placement import compressed, placed, placed_integers, stored_chunks
from flrc_edge.planning import factorize_all, plan_ranks


@pytest.fixture(scope="module")
def setting(compressed_stories: Any) -> Any:
    loaded = compressed_stories.source
    settings = replace(compressed_stories.settings, keep=(0.6,), allocator="spectrum", tokens=4096)
    statistics, _ = measure(loaded, settings)
    factors = factorize_all(loaded, statistics.moments)
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    plan = plan_ranks(shapes, settings, statistics.moments, factors)
    return loaded, settings, statistics.moments, factors, plan


def groups(loaded: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for p in loaded.config.projections():
        found.setdefault(p.group, []).append(p.name)
    return found


def test_an_unchanged_model_sees_the_same_inputs(setting: Any) -> None:
    loaded, _, _, _, _ = setting
    ids = calibration_windows(loaded, setting[1]).ids[:3]
    seen: list[str] = []

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        seen.extend(inputs.names)
        assert inputs.energy.trace() > 0 and not inputs.drift.any()
        adds = inputs.names[0].endswith(("o_proj", "down_proj"))
        assert (inputs.lack is not None) == adds
        assert inputs.lack is None or (not inputs.lack.any() and inputs.lack.shape[0] == 64)
        return {}

    walk(loaded.model, groups(loaded), ids, fit)
    assert seen == [p.name for p in loaded.config.projections()]


def test_moments_are_those_of_calibration(setting: Any) -> None:
    """gate_proj keeps E[x xᵀ] itself, so both ways of measuring must agree."""
    loaded, settings, moments, _, _ = setting
    found = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        found.update(dict.fromkeys(inputs.names, inputs.energy))
        return {}

    walk(loaded.model, groups(loaded), calibration_windows(loaded, settings).ids, fit)
    name = "model.layers.3.mlp.gate_proj"
    assert torch.allclose(found[name], moments[name].energy, rtol=1e-4, atol=1e-8)


def test_later_groups_see_what_was_replaced(setting: Any) -> None:
    loaded, settings, *_ = setting
    ids = calibration_windows(loaded, settings).ids[:2]
    changed = "model.layers.1.mlp.gate_proj"
    differs = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        differs[inputs.names[0]] = bool(inputs.drift.any())
        if changed not in inputs.names:
            return {}
        linear = deepcopy(loaded.model.get_submodule(changed))
        linear.weight.data *= 1.5
        return {changed: linear}

    before = deepcopy(loaded.model.state_dict())
    walk(loaded.model, groups(loaded), ids, fit)
    order = list(differs)
    after = order.index(changed) + 1
    assert not any(differs[n] for n in order[:after]) and all(differs[n] for n in order[after:])
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("group", ["self_attn.o_proj", "mlp.down_proj"])
def test_what_the_residual_stream_lacks(setting: Any, group: str) -> None:
    """Against both models run whole: the stream before and after a layer, less what its projections add."""
    loaded, settings, _, factors, plan = setting
    ids = calibration_windows(loaded, settings).ids[:2]
    found = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        name = f"model.layers.2.{group}"
        if name in inputs.names:
            found[name] = inputs
        with compressed(loaded, plan, factors) as model:
            return {n: deepcopy(model.get_submodule(n)) for n in inputs.names}

    def seen(model: Any) -> tuple[Any, Any]:
        module = "" if group == "self_attn.o_proj" else ".post_attention_layernorm"
        kept: dict[str, list[Any]] = {"stream": [], "inputs": []}
        hooks = [
            model.get_submodule(f"model.layers.2{part}").register_forward_pre_hook(
                lambda _, inputs, into=kept[key]: into.append(inputs[0].flatten(0, 1).double())
            )
            for key, part in (("stream", module), ("inputs", f".{group}"))
        ]
        for window in ids:
            model.model(window[None])
        for hook in hooks:
            hook.remove()
        return torch.cat(kept["stream"]), torch.cat(kept["inputs"])

    walk(loaded.model, groups(loaded), ids, fit)
    with torch.no_grad():
        stream, x = seen(loaded.model)
        with compressed(loaded, plan, factors) as model:
            twin_stream, x_hat = seen(model)
    inputs = found[f"model.layers.2.{group}"]
    assert inputs.lack is not None
    root = stream.square().mean(1, keepdim=True).rsqrt()  # every token counts by its square
    x, x_hat, stream, twin_stream = (rows * root for rows in (x, x_hat, stream, twin_stream))
    for got, expected in (
        (inputs.energy, x_hat.T @ x_hat),
        (inputs.drift, (x - x_hat).T @ x_hat),
        (inputs.lack, (stream - twin_stream).T @ x_hat),
    ):
        expected = expected / len(x)
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("m", [4, 9])
def test_correction_is_the_damped_regression(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flrc_edge.correction.RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = noise(4000, 6)
    seen, lack = x @ noise(6, 6) + 0.3 * noise(4000, 6), noise(4000, m)
    weight = noise(m, 6)
    factors = Factors(noise(m, 4).float(), noise(4, 6).float(), torch.zeros(4), 1.0)
    inputs = GroupInputs(("p",), seen.T @ seen / 4000, (x - seen).T @ seen / 4000, lack.T @ seen / 4000)
    rank = 3
    found = corrected(factors, weight, rank, inputs, strength=1.0)
    wanted = (x - seen) @ weight.T + lack
    change = torch.linalg.lstsq(seen @ factors.V[:rank].double().T, wanted).solution.T
    assert torch.allclose(found.U[:, :rank], factors.U[:, :rank] + change.float(), atol=1e-5)
    assert torch.equal(found.U[:, rank:], factors.U[:, rank:]) and found.V is factors.V
    half = corrected(factors, weight, rank, inputs, strength=0.5)
    assert torch.allclose(half.U[:, :rank], factors.U[:, :rank] + change.float() / 2, atol=1e-5)
    unlost = replace(inputs, drift=torch.zeros(6, 6, dtype=torch.float64), lack=None)
    assert torch.equal(corrected(factors, weight, rank, unlost).U, factors.U)


def test_correction_brings_the_model_nearer(setting: Any) -> None:
    """On windows that nothing was fitted to; of integers, too, whose dense weights take their share."""
    loaded, settings, _, factors, plan = setting
    ids = calibration_windows(loaded, settings).ids
    unseen = calibration_windows(loaded, replace(settings, seed=1)).ids
    before = stored_chunks(plan, factors)
    after = correct(loaded, plan, factors, ids)
    assert set(after.chunks) == set(before) and not after.integers
    rounded = with_formats(plan, "int4", head="int8", hidden_size=64)
    grams = weighted_grams(loaded.model, [p.name for p in plan.projections], ids)
    integers = quantize_model(loaded.model, rounded, before, grams)
    mended = correct(loaded, rounded, factors, ids, grams=grams)
    names = set(integers) - {"model.embed_tokens.weight"}
    assert set(mended.integers) == names
    assert any(p.dense for p in plan.projections)

    def error(placed_model: Any) -> float:
        with torch.no_grad(), placed_model as model:
            return sum(
                (model.model(w[None]).last_hidden_state - hidden).square().mean().item()
                for w, hidden in zip(unseen, reference, strict=True)
            )

    with torch.no_grad():
        reference = [loaded.model.model(w[None]).last_hidden_state for w in unseen]
    assert error(placed(loaded, plan, after.chunks)) < 0.98 * error(placed(loaded, plan, before))
    assert error(placed_integers(loaded, rounded, mended.chunks, mended.integers)) < 0.98 * error(
        placed_integers(loaded, rounded, before, {name: integers[name] for name in names})
    )
