"""Walk through a model layer by layer, replacing projections while knowing their inputs in both models.

At every input group there are the inputs of the original model, ``x``, and those of the model whose earlier
projections have been replaced already, ``x̂``. What the replacement should be is the caller's business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.errors import NumericalError
from flrc_edge.layer_pass import embedded, layer_arguments
from flrc_edge.progress import Progress, silent


@dataclass(frozen=True)
class GroupInputs:
    """Second moments of an input group's inputs, sums over tokens in float64 divided by their number.

    Args:
        names: The projections that read them.
        energy: ``E[x̂ x̂ᵀ]: [n, n]``.
        cross: ``E[x x̂ᵀ]: [n, n]``.
    """

    names: tuple[str, ...]
    energy: Tensor
    cross: Tensor


Fit = Callable[[GroupInputs], Mapping[str, nn.Module]]


@torch.no_grad()
def walk(
    model: Any,
    groups: Mapping[str, Sequence[str]],
    ids: Tensor,
    fit: Fit,
    *,
    progress: Progress = silent,
    phase: str = "fit",
) -> None:
    """Replace the projections of every decoder layer in turn.

    Args:
        model: A Hugging Face causal language model; left as it was.
        groups: The projections (full names) of every input group, in the order of the forward pass.
        ids: ``[windows, T]`` token ids.
        fit: Called once a group; returns the module that takes each projection's place.
        progress: Called after every layer.
        phase: What the progress is called.

    Raises:
        NumericalError: An input is not finite.
    """
    layers = model.model.layers
    arguments = layer_arguments(model, ids[:1])
    hidden = [embedded(model, window) for window in ids]
    replaced_hidden = list(hidden)
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}."
        twin = copy.deepcopy(layer)
        mine = [tuple(names) for names in groups.values() if names[0].startswith(prefix)]
        firsts = [names[0].removeprefix(prefix) for names in mine]
        with _recorded(layer, firsts) as originals:
            outputs = [layer(h, **arguments[index]) for h in hidden]
        for names, first in zip(mine, firsts, strict=True):
            inputs = _moments(names, originals[first], twin, first, replaced_hidden, arguments[index])
            for name, module in fit(inputs).items():
                _put(twin, name.removeprefix(prefix), module)
        hidden = outputs
        replaced_hidden = [twin(h, **arguments[index]) for h in replaced_hidden]
        progress(phase, index + 1, len(layers))


class _Reached(Exception):
    """Ends a layer's forward pass where nothing behind it is wanted."""


@contextmanager
def _recorded(
    layer: nn.Module, names: Sequence[str], *, stop: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs ``[T, n]`` of projections inside a layer, one tensor a forward pass.

    With ``stop`` the pass ends there, by an exception.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:

            def remember(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found[name].append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
                if stop:
                    raise _Reached

            stack.callback(layer.get_submodule(name).register_forward_pre_hook(remember).remove)
        yield found


def _moments(
    names: tuple[str, ...],
    originals: Sequence[Tensor],
    twin: nn.Module,
    first: str,
    hidden: Sequence[Tensor],
    arguments: Mapping[str, Any],
) -> GroupInputs:
    n = originals[0].shape[1]
    energy = torch.zeros(n, n, dtype=torch.float64)
    cross = torch.zeros(n, n, dtype=torch.float64)
    tokens = 0
    with _recorded(twin, [first], stop=True) as found:
        for h, x in zip(hidden, originals, strict=True):
            with suppress(_Reached):
                twin(h, **arguments)
            seen = found[first].pop().double()
            if not torch.isfinite(seen).all():
                raise NumericalError(f"{names[0]}: its inputs are not finite")
            energy.addmm_(seen.T, seen)
            cross.addmm_(x.double().T, seen)
            tokens += len(seen)
    return GroupInputs(names, energy / tokens, cross / tokens)


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)
