"""Where a pass over the layers is, kept in a file, so that a killed run goes on after the last layer it finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flrc_runtime.files import sync

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassState:
    """A pass between two layers.

    Args:
        layer: This layer and all above it are done.
        loss: Summed over all tokens, nats, float64.
        gradients: By window, ``[1, T, h]``, of the loss with respect to that layer's input.
    """

    layer: int
    loss: Tensor
    gradients: Sequence[Tensor]


class PassJournal:
    """Keeps the state of one pass in a file that is replaced whole.

    Args:
        path: The file. Its name has to say all that the pass depends on: what is found there is gone on with.
        sums: Tensors of the caller's own, by names that are not the state's: stored with every state, and filled when
            one is found.
        holds: Whether what the caller keeps of a finished layer elsewhere is there; otherwise the pass begins again.
    """

    def __init__(
        self,
        path: Path,
        *,
        sums: Mapping[str, Tensor] | None = None,
        holds: Callable[[int], bool] = lambda layer: True,
    ) -> None:
        self.path = path
        self._sums = {f"sums.{name}": tensor for name, tensor in (sums or {}).items()}
        self._holds = holds
        self._broken = False

    def load(self, layers: int) -> PassState | None:
        """Return the state of an interrupted pass over ``layers`` layers; None if there is none to go on with."""
        if not self.path.exists():
            return None
        try:
            found = load_file(self.path)
            windows = sum(name.startswith("gradients.") for name in found)
            gradients = [found[f"gradients.{i}"] for i in range(windows)]
            state = PassState(int(found["layer"]), found["loss"], gradients)
            kept = {name: found[name] for name in self._sums}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            _log.warning("the state of an interrupted run is damaged, and this one begins anew: %s", error)
            return None
        if not all(self._holds(layer) for layer in range(state.layer, layers)):
            return None
        for name, tensor in self._sums.items():
            tensor.copy_(kept[name])
        if state.layer < layers:
            _log.info(
                "going on where an interrupted run stopped: %d of %d layers are done",
                layers - state.layer,
                layers,
            )
        return state

    def save(self, state: PassState) -> None:
        """Replace the state. A disk that is full ends the journal, not the run."""
        if self._broken:
            return
        temporary = self.path.with_name(f"{self.path.name}.new")
        tensors = {
            "layer": torch.tensor(state.layer),
            "loss": state.loss,
            **{f"gradients.{i}": gradient for i, gradient in enumerate(state.gradients)},
            **self._sums,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            sync(temporary)
            temporary.replace(self.path)
        except (SafetensorError, OSError) as error:
            self._broken = True
            _log.warning("this run could not be gone on with if it were interrupted: %s", error)
            temporary.unlink(missing_ok=True)
