"""A pass over calibration windows, forward and backward, one decoder layer at a time.

Forward keeps nothing but the inputs of the layers, in a file; backward, from the last layer to the first, computes each
layer again for all windows in turn. So the activations of one layer and one window are in memory, and what a caller
sums up of one layer, whatever the number of layers and tokens. It costs one more forward pass.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import BytesIO
from typing import IO, Any

import torch
from torch import Tensor, nn

from flrc_edge.errors import FlrcError, NumericalError
from flrc_edge.pass_journal import PassJournal, PassState
from flrc_edge.progress import Progress, silent
from flrc_edge.token_loss import Labels, NotFiniteError, loss_gradient
from flrc_runtime.cache import ENVIRONMENT, cache_folder

IN_MEMORY = 64 << 20  # bytes of layer inputs that need no file
ADVICE = "load the model in float32 and look at its weights and at that text"
Around = Callable[[int], AbstractContextManager[object]]


def layer_pass(
    model: Any,
    ids: Tensor,
    around: Around,
    *,
    labels: Labels = "sampled",
    seeds: Sequence[int] | None = None,
    journal: PassJournal | None = None,
    progress: Progress = silent,
    phase: str = "calibrate",
) -> Tensor:
    """Run every layer backward over all windows, inside a context of the caller's.

    Args:
        model: A Hugging Face causal language model with float32 weights; in eval mode for the time, and no weight wants
            a gradient but those that ``around`` asks one for.
        ids: ``[windows, T]`` token ids; each window is one batch.
        around: Called with the number of a layer, from the last to the first; the context it returns is entered while
            that layer runs forward and backward.
        labels: See :func:`flrc_edge.token_loss.loss_gradient`.
        seeds: Of every window's sampled labels, and its number in errors; 0, 1, … by default.
        journal: Where the state is kept between two layers; a state that is there is gone on with.
        progress: Called after every window of every layer.
        phase: What the progress is called.

    Returns:
        The loss summed over all tokens, nats, float64.

    Raises:
        NumericalError: An activation, gradient or loss is not finite; names the first such projection and the window.
        FlrcError: There is no room for the layers' inputs.
    """
    numbers = range(len(ids)) if seeds is None else seeds
    layers: Sequence[nn.Module] = model.model.layers
    total = len(ids) * (len(layers) + 1)
    state = None if journal is None else journal.load(len(layers))
    todo = len(layers) if state is None else state.layer
    with _evaluated(model), _LayerInputs(model, ids, todo) as inputs:
        arguments = layer_arguments(model, ids[:1]) if len(ids) else []
        done = len(ids) * (len(layers) - todo + 1)
        progress(phase, done if state else 0, total)
        if state is None:
            state = _forward_and_head(
                model, ids, arguments, inputs, labels, numbers, lambda count: progress(phase, count, total)
            )
            if journal is not None:
                journal.save(state)
        elif todo:
            for window in ids:
                _forward(model, window, arguments[:todo], inputs)
        loss, gradients = state.loss, list(state.gradients)
        del state  # the gradients of a window are replaced by the next layer's
        for index in reversed(range(todo)):
            with around(index), torch.enable_grad():
                for i, number in enumerate(numbers):
                    x = inputs.read(i, index).requires_grad_()
                    with _named(number):
                        layers[index](x, **arguments[index]).backward(gradients[i])
                    assert x.grad is not None
                    gradients[i] = x.grad
                    done += 1
                    progress(phase, done, total)
            if journal is not None:
                journal.save(PassState(index, loss, gradients))
    return loss


def _forward_and_head(
    model: Any,
    ids: Tensor,
    arguments: Sequence[Mapping[str, Any]],
    inputs: _LayerInputs,
    labels: Labels,
    numbers: Sequence[int],
    report: Callable[[int], None],
) -> PassState:
    """Keep the inputs of all layers; return the loss and its gradients at the output of the last layer."""
    loss = torch.zeros((), dtype=torch.float64)
    gradients: list[Tensor] = []
    for done, (number, window) in enumerate(zip(numbers, ids, strict=True), 1):
        with _named(number):
            last = _forward(model, window, arguments, inputs).requires_grad_()
            with torch.enable_grad():
                hidden = model.model.norm(last)
            found, gradient = loss_gradient(model, hidden, window, labels=labels, seed=number)
            loss += found
            hidden.backward(gradient)
            assert last.grad is not None
            gradients.append(last.grad)
        report(done)
    return PassState(len(arguments), loss, gradients)


def in_layer(names: Iterable[str], layer: int) -> list[str]:
    """Return those names of modules that lie in one decoder layer."""
    return [name for name in names if name.startswith(f"model.layers.{layer}.")]


def layer_arguments(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Return the keyword arguments that the model calls each layer with, for windows as long as ``ids: [1, T]``."""
    arguments: list[dict[str, Any]] = []

    def remember(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        arguments.append(keywords)

    with ExitStack() as stack, torch.no_grad():
        for layer in model.model.layers:
            stack.callback(layer.register_forward_pre_hook(remember, with_kwargs=True).remove)
        model.model(input_ids=ids, use_cache=False)
    return arguments


def embedded(model: Any, window: Tensor) -> Tensor:
    """Return what the first layer reads of a window ``[T]``: ``[1, T, h]``."""
    found: list[Tensor] = []

    def enter(_: nn.Module, positional: tuple[Any, ...]) -> None:
        found.append(positional[0])
        raise _Reached

    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.model.layers[0].register_forward_pre_hook(enter).remove)
        with suppress(_Reached):
            model.model(input_ids=window[None], use_cache=False)
    return found[0]


class _Reached(Exception):
    """Ends a forward pass where nothing behind it is wanted."""


@torch.no_grad()
def _forward(
    model: Any, window: Tensor, arguments: Sequence[Mapping[str, Any]], inputs: _LayerInputs
) -> Tensor:
    """Keep the inputs of the first ``len(arguments)`` layers; return the output of the last of these: ``[1, T, h]``."""
    x = embedded(model, window)
    for index, layer in enumerate(model.model.layers[: len(arguments)]):
        inputs.append(x)
        y = layer(x, **arguments[index])
        # A sum is finite where its terms are, but for overflow; looking at each takes four times as long.
        if not torch.isfinite(y.sum()) and not torch.isfinite(y).all():
            name = _first_not_finite(layer, x, arguments[index])
            raise NotFiniteError(f"model.layers.{index}{name}: activations are not finite")
        x = y
    return x


def _first_not_finite(layer: nn.Module, x: Tensor, arguments: Mapping[str, Any]) -> str:
    """Return ``.`` and the name of the first linear module of a layer whose output is not finite; else nothing."""
    found: list[str] = []
    with ExitStack() as stack:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):

                def look(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                    if not torch.isfinite(output).all():
                        found.append(f".{name}")

                stack.callback(module.register_forward_hook(look).remove)
        layer(x, **arguments)
    return found[0] if found else ""


@contextmanager
def _named(window: int) -> Iterator[None]:
    """Say in which window something is not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise NumericalError(f"{error} in calibration window {window}", hint=ADVICE) from None


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without gradients of weights, and leave it as it was."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


class _LayerInputs:
    """``[windows, layers]`` tensors ``[1, T, h]`` in a temporary file, which is gone when the context ends.

    A file, not a memory map: its pages are the system's cache and not this process's memory.
    """

    def __init__(self, model: Any, ids: Tensor, layers: int) -> None:
        weight: Tensor = model.get_input_embeddings().weight
        self._dtype, self._shape = weight.dtype, (1, ids.shape[1], weight.shape[1])
        self._bytes = ids.shape[1] * weight.shape[1] * weight.element_size()
        self._layers = layers
        self._size = len(ids) * self._layers * self._bytes
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _LayerInputs:
        if self._size <= IN_MEMORY:
            self._file = BytesIO()
            return self
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < self._size:
                raise FlrcError(
                    f"{folder} has {free / 1e9:.1f} GB free, the inputs of all layers take {self._size / 1e9:.1f} GB",
                    hint=f"calibrate on fewer --tokens, or set {ENVIRONMENT} to a folder on a larger disk",
                )
            self._file = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, x: Tensor) -> None:
        """Keep the next input; window by window, its layers in order."""
        assert self._file is not None
        try:
            self._file.write(x.contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise self._unwritable(error) from None

    def read(self, window: int, layer: int) -> Tensor:
        """Return an input that was kept."""
        assert self._file is not None
        self._file.seek((window * self._layers + layer) * self._bytes)
        data = bytearray(self._file.read(self._bytes))
        return torch.frombuffer(data, dtype=self._dtype).view(self._shape)

    def _unwritable(self, error: OSError) -> FlrcError:
        return FlrcError(
            f"the inputs of all layers ({self._size / 1e9:.1f} GB) cannot be kept in {cache_folder()}: "
            f"{error.strerror or error}",
            hint=f"set {ENVIRONMENT} to a folder that can be written",
        )
