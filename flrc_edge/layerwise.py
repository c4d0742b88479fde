"""Walk through a model layer by layer, replacing projections while knowing their inputs in both models.

At every input group there are the inputs of the original model, ``x``, and those of the model whose earlier
projections have been replaced already, ``x̂``. Where outputs are added to the residual stream, there is also what that
stream lacks by then, ``d``. What the replacement should be is the caller's business.
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

# Whose input is the residual stream that a projection's outputs are added to, in the layers of Llama, Mistral and Qwen;
# "" is the layer itself.
STREAMS: Mapping[str, str] = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


@dataclass(frozen=True)
class GroupInputs:
    """Second moments of an input group's inputs, float64: means over tokens.

    Where outputs are added to the residual stream, each token counts by one over the mean square of the original stream
    there: so do the norms that read the stream, and a few massive tokens would count for all others.

    Args:
        names: The projections that read them.
        energy: ``E[x̂ x̂ᵀ]: [n, n]``.
        drift: ``E[(x - x̂) x̂ᵀ]: [n, n]``.
        lack: ``E[d x̂ᵀ]: [hidden size, n]``, d what the residual stream that outputs are added to lacks; None where
            they are not added to one as they are.
    """

    names: tuple[str, ...]
    energy: Tensor
    drift: Tensor
    lack: Tensor | None = None


Fit = Callable[[GroupInputs], Mapping[str, nn.Module]]


@torch.no_grad()
def walk(
    model: Any,
    groups: Mapping[str, Sequence[str]],
    ids: Tensor,
    fit: Fit,
    *,
    streams: Mapping[str, str] = STREAMS,
    progress: Progress = silent,
    phase: str = "fit",
) -> None:
    """Replace the projections of every decoder layer in turn.

    Args:
        model: A Hugging Face causal language model; left as it was.
        groups: The projections (full names) of every input group, in the order of the forward pass.
        ids: ``[windows, T]`` token ids.
        fit: Called once a group; returns the module that takes each projection's place.
        streams: By the name of a projection in its layer, the module whose input is the residual stream that its
            outputs are added to; "" for the layer itself. Empty where they are normalized or scaled before.
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
        mine = {
            names[0].removeprefix(prefix): tuple(names)
            for names in groups.values()
            if names[0].startswith(prefix)
        }
        watched = [*mine, *(streams[first] for first in mine if streams.get(first))]
        with _recorded(layer, watched) as originals:
            outputs = [layer(h, **arguments[index]) for h in hidden]
        originals[""] = [_flat(h) for h in hidden]
        for first, names in mine.items():
            moments, stream = _Moments(), streams.get(first)
            for i, h in enumerate(replaced_hidden):
                seen, reached = _inputs(twin, first, stream, h, arguments[index])
                pair = None if stream is None or reached is None else (originals[stream][i], reached)
                moments.add(originals[first][i], seen, pair)
            for name, module in fit(moments.of(names)).items():
                _put(twin, name.removeprefix(prefix), module)
        hidden = outputs
        replaced_hidden = [twin(h, **arguments[index]) for h in replaced_hidden]
        progress(phase, index + 1, len(layers))


class _Moments:
    """Sums over windows. Products are float32: their sums serve a damped regression, not an eigenbasis."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._tokens = 0

    def add(self, original: Tensor, seen: Tensor, streams: tuple[Tensor, Tensor] | None) -> None:
        """Add one window: inputs ``[T, n]`` and, if there is one, the residual stream, of both models."""
        lacks = [original - seen]
        if streams is not None:
            stream, reached = streams
            square = stream.square().mean(1, keepdim=True)
            weight = square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt()
            seen, lacks = seen * weight, [lacks[0] * weight, (stream - reached) * weight]
        products = [(rows.T @ seen).double() for rows in (seen, *lacks)]
        self._sums = [a + b for a, b in zip(self._sums, products, strict=True)] if self._sums else products
        self._tokens += len(seen)

    def of(self, names: tuple[str, ...]) -> GroupInputs:
        """Return the means.

        Raises:
            NumericalError: One is not finite.
        """
        energy, drift, *lack = (total / self._tokens for total in self._sums)
        if not all(torch.isfinite(mean).all() for mean in (energy, drift, *lack)):
            raise NumericalError(f"{names[0]}: its inputs are not finite")
        return GroupInputs(names, energy, drift, lack[0] if lack else None)


class _Reached(Exception):
    """Ends a layer's forward pass where nothing behind it is wanted."""


@contextmanager
def _recorded(
    layer: nn.Module, names: Sequence[str], *, last: str | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs ``[T, n]`` of modules inside a layer, one tensor a forward pass.

    A pass ends at the module ``last``, by an exception.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:

            def remember(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found[name].append(_flat(inputs[0].detach()))
                if name == last:
                    raise _Reached

            stack.callback(layer.get_submodule(name).register_forward_pre_hook(remember).remove)
        yield found


def _inputs(
    twin: nn.Module, first: str, stream: str | None, hidden: Tensor, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return the inputs ``[T, n]`` of a projection and, if there is one, of what reads its residual stream."""
    wanted = [stream, first] if stream else [first]
    with _recorded(twin, wanted, last=first) as found, suppress(_Reached):
        twin(hidden, **arguments)
    found[""] = [_flat(hidden)]
    return found[first][0], None if stream is None else found[stream][0]


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)
