"""A pass layer by layer: the gradients of a whole model at once, in the memory of one layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from flrc_edge import layer_pass as passes
from flrc_edge.errors import FlrcError
from flrc_edge.layer_pass import layer_pass
from flrc_edge.models import open_model

FAMILIES = ("llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text")
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def windows(count: int = 3, length: int = 24) -> Tensor:
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_gradients_are_those_of_the_whole_model(
    family: str,
    in_file: bool,
    family_model: Callable[[str], Path],
    whole_backward: Callable[..., None],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_file:
        monkeypatch.setattr(passes, "IN_MEMORY", 0)
    model: Any = open_model(str(family_model(family))).model
    ids = windows()
    layers = len(model.model.layers)
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in KINDS]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(name: str) -> Any:
        return model.get_submodule(name).register_full_backward_hook(
            lambda _, __, gradient: found[name].append(gradient[0].clone())
        )

    handles = [look(name) for name in names]
    model.get_input_embeddings().weight.requires_grad_(True)
    for i, window in enumerate(ids):
        whole_backward(model, window, labels="sampled", seed=i)
    model.zero_grad()
    for handle in handles:
        handle.remove()
    expected, found = found, {name: [] for name in names}
    order: list[int] = []

    @contextmanager
    def around(layer: int) -> Iterator[None]:
        order.append(layer)
        handles = [look(name) for name in names if name.startswith(f"model.layers.{layer}.")]
        yield
        for handle in handles:
            handle.remove()

    layer_pass(model, ids, around)
    assert order == [*range(layers)][::-1]
    for name in names:
        assert len(found[name]) == len(ids)
        for a, b in zip(found[name], expected[name], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), name
    assert not list(cache.iterdir()) if in_file else not cache.exists()


def test_the_loss_is_that_of_the_model(stories: Path) -> None:
    model: Any = open_model(str(stories)).model
    ids = windows()
    loss = layer_pass(model, ids, lambda _: nullcontext(), labels="text")
    with torch.no_grad():
        own = sum(model(w[None], labels=w[None]).loss.item() * (len(w) - 1) for w in ids)
    assert loss.item() == pytest.approx(own, rel=1e-5)


def test_activations_of_one_layer_are_kept(stories: Path) -> None:
    """Of the tensors that autograd saves, no more are alive at once than one layer of one window needs."""
    model: Any = open_model(str(stories)).model
    alive: WeakSet[Any] = WeakSet()
    peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor = tensor
            alive.add(self)
            peak = max(peak, len(alive))

    def saved_by(run: Callable[[], object]) -> int:
        nonlocal peak
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            run()
        return peak

    ids = windows(4)
    by_layer = saved_by(lambda: layer_pass(model, ids, lambda _: nullcontext()))
    assert not alive
    whole = saved_by(lambda: model(ids[:1], labels=ids[:1]))
    assert by_layer < whole / 3  # of five layers, and the head


def test_a_disk_without_room(stories: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(stories)).model
    monkeypatch.setattr(passes, "IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FlrcError, match=r"has 0\.0 GB free, the inputs of all layers take") as raised:
        layer_pass(model, windows(), lambda _: nullcontext())
    assert raised.value.hint is not None and "FLRC_EDGE_CACHE" in raised.value.hint
    assert all(p.requires_grad for p in model.parameters())


def test_a_disk_that_fills_up(stories: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "IN_MEMORY", 0)

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(passes.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(FlrcError, match=r"cannot be kept in .*: No space left on device"):
        layer_pass(open_model(str(stories)).model, windows(), lambda _: nullcontext())


def test_no_windows(stories: Path) -> None:
    """The share of a process that has none, when there are more processes than windows."""
    entered: list[int] = []

    def around(layer: int) -> Any:
        entered.append(layer)
        return nullcontext()

    model = open_model(str(stories)).model
    assert layer_pass(model, windows()[:0], around) == 0
    assert len(entered) == 5  # sums are added over processes at every layer
