"""The statistics against plain autograd in float64, in one process and in two."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flrc_edge.calibration import Moments, Statistics, calibrate
from flrc_edge.errors import NumericalError
from flrc_edge.models import open_model

WINDOWS, LENGTH = 3, 24


@pytest.fixture(scope="module", params=["stories", "qwen2", "qwen3", "gemma3_text"])
def measured(
    request: pytest.FixtureRequest, stories: Path, family_model: Callable[[str], Path]
) -> tuple[Any, list[str], Tensor, Statistics]:
    """Model, projections, windows and their statistics."""
    loaded = open_model(str(stories if request.param == "stories" else family_model(request.param)))
    ids = torch.randint(3, 512, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    names = [p.name for p in loaded.config.projections()]
    return loaded.model, names, ids, calibrate(loaded.model, names, ids, labels="text")


def reference(model: Any, names: list[str], ids: Tensor) -> tuple[dict[str, Moments], float]:
    """Every matrix in full and in float64: all x, y and g side by side, one weight gradient a window."""
    exact = copy.deepcopy(model).double()
    modules = {name: exact.get_submodule(name) for name in names}
    seen: dict[str, dict[str, list[Tensor]]] = {name: {"x": [], "y": [], "g": [], "G": []} for name in names}
    loss_sum = 0.0

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor, outputs: dict[str, Tensor]) -> None:
        seen[name]["x"].append(inputs[0][0].detach())
        outputs[name] = output

    for window in ids:
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(
                lambda _, inputs, output, name=name, outputs=outputs: keep(name, inputs, output, outputs)
            )
            for name, module in modules.items()
        ]
        logits = exact(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, window[1:], reduction="sum")
        weights = [m.weight for m in modules.values()]
        gradients = torch.autograd.grad(loss, [*(outputs[n] for n in names), *weights])
        loss_sum += loss.item()
        for handle in handles:
            handle.remove()
        for name, g, big in zip(names, gradients, gradients[len(names) :], strict=False):
            seen[name]["g"].append(g[0])
            seen[name]["G"].append(big)
            seen[name]["y"].append(seen[name]["x"][-1] @ modules[name].weight.detach().T)  # no bias
    result = {}
    for name, s in seen.items():
        x, y, g = (torch.cat(s[k]) for k in "xyg")
        weight = modules[name].weight.detach()
        m, n = weight.shape
        first, second = (y, g) if m <= n else (x, g @ weight)
        size = g.square().sum(1)
        result[name] = Moments(
            first.T @ first / len(x),
            second.T @ second / len(x),
            g.square().sum().item() / len(x),
            sum(b.square().sum().item() for b in s["G"]) / len(ids),
            sum((b * weight).square().sum().item() for b in s["G"]) / len(ids),
            (first.T * size) @ first / size.sum(),
        )
    return result, loss_sum / (len(ids) * (ids.shape[1] - 1))


def test_moments_and_fisher_scores_equal_plain_autograd(measured: Any) -> None:
    model, names, ids, found = measured
    expected, loss = reference(model, names, ids)
    assert found.loss == pytest.approx(loss, rel=1e-6) and found.tokens == ids.numel()
    shapes = {model.get_parameter(f"{n}.weight").shape for n in names}
    assert {m > n for m, n in shapes} == {True, False}  # both forms are covered
    for name in names:
        a, b = found.moments[name], expected[name]
        for what in ("energy", "weighted", "gradient"):
            x, y = getattr(a, what), getattr(b, what)
            assert x.dtype == torch.float64 and x.shape == y.shape
            # Products of the model are float32; one machine's differ from another's by 1e-5 here.
            assert (x - y).norm() <= 3e-5 * y.norm(), (name, what)
        for what in ("gradient_trace", "fisher_g2", "fisher_gw2"):
            assert getattr(a, what) == pytest.approx(getattr(b, what), rel=1e-5), (name, what)


def test_bias_is_left_out(family_model: Callable[[str], Path]) -> None:
    """The bias of qwen2's k_proj is not part of what is factorized."""
    loaded = open_model(str(family_model("qwen2")))
    name = "model.layers.0.self_attn.k_proj"
    ids = torch.randint(3, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loaded.model.get_parameter(f"{name}.bias").fill_(100.0)
    energy = calibrate(loaded.model, [name], ids).moments[name].energy
    assert energy.trace() < 1e3  # with the bias it is over 32 * 100²


def test_loss_is_the_models_own(measured: Any) -> None:
    model, _, ids, found = measured
    with torch.no_grad():
        own = [model(input_ids=w[None], labels=w[None]).loss.item() for w in ids]
    assert found.loss == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_head_in_chunks_changes_nothing(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names, ids, found = measured
    monkeypatch.setattr("flrc_edge.token_loss.HEAD_CHUNK", 7)
    again = calibrate(model, names, ids, labels="text")
    assert again.loss == pytest.approx(found.loss, rel=1e-6)
    for name in names:
        assert again.moments[name].fisher_gw2 == pytest.approx(found.moments[name].fisher_gw2, rel=1e-4)


def test_deterministic(measured: Any) -> None:
    model, names, ids, found = measured
    again = calibrate(model, names, ids, labels="text")
    assert again.loss == found.loss
    for name in names:
        a, b = again.moments[name], found.moments[name]
        assert torch.equal(a.energy, b.energy) and torch.equal(a.gradient, b.gradient)
        assert (a.gradient_trace, a.fisher_g2, a.fisher_gw2) == (b.gradient_trace, b.fisher_g2, b.fisher_gw2)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "training": model.training,
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(n, len(m._forward_hooks), len(m._backward_hooks)) for n, m in model.named_modules()],
        "tensor hooks": [bool(p._post_accumulate_grad_hooks) for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(stories: Path, fails: bool) -> None:
    loaded = open_model(str(stories))
    model: Any = loaded.model
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    trained = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    trained.grad = torch.full_like(trained, 3.0)  # from a user's own training
    names = [p.name for p in loaded.config.projections()]
    ids = torch.arange(3, 35)[None]
    clean = calibrate(model, names, ids).moments["model.layers.1.mlp.up_proj"].fisher_g2
    before = state_of(model)
    if fails:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model, names, ids.repeat(2, 1), progress=stop)
    else:
        trained.grad.fill_(1e6)
        before = state_of(model)
        found = calibrate(model, names, ids).moments["model.layers.1.mlp.up_proj"].fisher_g2
        assert found == clean  # an earlier gradient is no part of the score
    after = state_of(model)
    for key, value in before.items():
        assert same(value, after[key]), key


def test_works_where_gradients_are_off(stories: Path) -> None:
    loaded = open_model(str(stories))
    with torch.no_grad():
        result = calibrate(loaded.model, ["model.layers.0.mlp.up_proj"], torch.arange(3, 35)[None])
    assert result.moments["model.layers.0.mlp.up_proj"].fisher_g2 > 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("self_attn.q_proj", float("nan")),
        ("self_attn.o_proj", float("inf")),
        ("mlp.gate_proj", float("nan")),
        ("mlp.up_proj", float("inf")),
        ("mlp.down_proj", float("nan")),
    ],
)
def test_a_bad_weight_is_named(stories: Path, kind: str, value: float) -> None:
    loaded = open_model(str(stories))
    name = f"model.layers.2.{kind}"
    with torch.no_grad():
        loaded.model.get_parameter(f"{name}.weight")[0, 0] = value
    names = [p.name for p in loaded.config.projections()]
    before = state_of(loaded.model)
    with pytest.raises(NumericalError, match=f"^{name}: activations are not finite in .* window 0$"):
        calibrate(loaded.model, names, torch.arange(3, 67).reshape(2, 32))
    assert all(same(v, state_of(loaded.model)[k]) for k, v in before.items())


def test_a_bad_window_is_named(family_model: Callable[[str], Path]) -> None:
    loaded = open_model(str(family_model("llama")))
    names = [p.name for p in loaded.config.projections()]
    ids = torch.arange(3, 99).reshape(3, 32)
    with torch.no_grad():
        loaded.model.get_parameter("model.embed_tokens.weight")[80] = float("nan")  # only in window 2
    with pytest.raises(
        NumericalError, match=r"^model.layers.0.self_attn.q_proj: activations .* calibration window 2$"
    ):
        calibrate(loaded.model, names, ids)


def test_a_bad_loss_and_a_bad_gradient_are_told_apart(stories: Path) -> None:
    loaded = open_model(str(stories))
    names = [p.name for p in loaded.config.projections()]
    ids = torch.arange(3, 35)[None]
    norm = loaded.model.get_parameter("model.norm.weight")
    with torch.no_grad():
        kept = norm[0].item()
        norm[0] = float("nan")
        with pytest.raises(NumericalError, match=r"^the logits are not finite in calibration window 0$"):
            calibrate(loaded.model, names, ids)
        norm[0] = kept
    layer = loaded.model.get_submodule("model.layers.3")
    handle = layer.register_full_backward_pre_hook(lambda _, g: (g[0] * float("nan"),))
    with pytest.raises(NumericalError, match=r"^model.layers.3.mlp.down_proj: gradients are not finite"):
        calibrate(loaded.model, names, ids)
    handle.remove()


def test_moments_are_handed_over_a_layer_at_a_time(measured: Any) -> None:
    model, names, ids, found = measured
    order: list[str] = []

    class Noted(dict[str, Moments]):
        def __setitem__(self, name: str, moments: Moments) -> None:
            order.append(name)
            super().__setitem__(name, moments)

    into = Noted()
    again = calibrate(model, names, ids, labels="text", into=into)
    assert again.moments is into and set(into) == set(names)
    layers = [int(name.split(".")[2]) for name in order]
    assert layers == sorted(layers, reverse=True)
    assert all(torch.equal(into[n].energy, found.moments[n].energy) for n in names)


def test_only_linear_projections(stories: Path) -> None:
    model = open_model(str(stories)).model
    with pytest.raises(TypeError, match=r"model.norm is LlamaRMSNorm"):
        calibrate(model, ["model.norm"], torch.arange(3, 35)[None])
    assert all(p.requires_grad for p in model.parameters())


SCRIPT = """
import os
import sys
from safetensors.torch import save_file
import torch
from flrc_edge.calibration import _processes, calibrate, is_main_process
from flrc_edge.models import open_model
torch.set_num_threads(1)
assert _processes()[1] == 2
seen = []
loaded = open_model(sys.argv[1])
ids = torch.randint(3, 512, (5, 32), generator=torch.Generator().manual_seed(4))
names = [p.name for p in loaded.config.projections()]
result = calibrate(loaded.model, names, ids, progress=lambda phase, done, total: seen.append(total))
assert seen[-1] == (3 if is_main_process() else 2) * 6  # forward, and 5 layers backward
if is_main_process():
    found = {}
    for name, m in result.moments.items():
        for what in ("energy", "weighted", "gradient"):
            found[f"{name}.{what}"] = getattr(m, what)
        scalars = [m.gradient_trace, m.fisher_g2, m.fisher_gw2, result.loss, result.tokens]
        found[name + ".scalars"] = torch.tensor(scalars, dtype=torch.float64)
    save_file(found, sys.argv[2])
os._exit(0)  # as the command line ends: torch's threads abort some processes in the interpreter's teardown
"""


def test_two_processes_give_the_statistics_of_one(stories: Path, tmp_path: Path) -> None:
    """Five windows, so one process has three and the other two. ``--cpu`` would start one process only."""
    from safetensors.torch import load_file

    script, output = tmp_path / "script.py", tmp_path / "out.safetensors"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--main_process_port", "0", script, stories, output,
        ],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = open_model(str(stories))
    ids = torch.randint(3, 512, (5, 32), generator=torch.Generator().manual_seed(4))
    alone = calibrate(loaded.model, [p.name for p in loaded.config.projections()], ids)
    both = load_file(output)
    assert len(both) == 4 * len(alone.moments)
    for name, m in alone.moments.items():
        for what in ("energy", "weighted", "gradient"):
            expected = getattr(m, what)
            assert (both[f"{name}.{what}"] - expected).norm() <= 1e-10 * expected.norm(), name
        scalars = [m.gradient_trace, m.fisher_g2, m.fisher_gw2, alone.loss, alone.tokens]
        assert both[f"{name}.scalars"].tolist() == pytest.approx(scalars, rel=1e-10)
