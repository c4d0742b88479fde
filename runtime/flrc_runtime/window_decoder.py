"""One sequence in graphs of fixed shape (``export --graph static``): its window of keys and values, ids in, logits out.

Each stage has a graph for one token and one for a piece of the prompt. Both read the window and return the new keys and
values alone, which are written into the window here: what a step copies does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .any_decoder import Positions
from .errors import FormatError
from .kv_cache import KvShape
from .manifest import ModelInfo, prefill_graph
from .sessions import StageSessions

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

FloatArray = NDArray[np.float32]

LAST = "last"  # the input of a prompt graph that says of which of its tokens logits are wanted
BIAS, LOCAL_BIAS = "attention_bias", "local_attention_bias"
LOCAL_WINDOW = "local_window"  # metadata of a graph: positions that a token of a local layer sees with itself
MAX_WINDOW = 10**6
UNSEEN = -1e4  # added to a score: its share is 0, also in float16, which it does not overflow


class WindowSessions(StageSessions):
    """The graphs of a static bundle, two a stage.

    Attributes:
        local_window: Positions that a token of a local layer sees with itself; None without such layers.
    """

    local_window: int | None = None

    @property
    def model(self) -> ModelInfo:
        """Facts of the model; its context length is the window of the graphs."""
        return self._manifest.model

    def prefill(self, stage: int) -> InferenceSession:
        """Return the session that takes a piece of the prompt, opening it if it is not.

        Raises:
            FormatError: The graph does not load or has other inputs and outputs than its manifest says.
        """
        return self._get(prefill_graph(self._manifest.stages[stage].graph))

    def tokens_at_once(self, stage: int) -> int:
        """Return the tokens of a prompt that one run of a stage takes."""
        return _count(self.prefill(stage), self._folder.name)

    def _checked(self, session: InferenceSession, name: str) -> KvShape:
        where = f"{self._folder.name}/{name}"
        model = self.model
        window, count = model.context_length, _count(session, where)
        if (count > 1) == any(name == stage.graph for stage in self._manifest.stages):
            raise FormatError(f"{where}: it takes {count} tokens at once", hint="export the bundle again")
        kv = (1, model.num_kv_heads)
        expected: dict[str, tuple[int, ...]] = {"input_ids": (1, count), "position_ids": (1, count)}
        inputs = {node.name: tuple(node.shape) for node in session.get_inputs()}
        expected |= {n: (1, 1, count, window + count) for n in (BIAS, LOCAL_BIAS) if n in inputs}
        if LOCAL_BIAS in inputs:
            self.local_window = _local_window(session, where)
        if count > 1:
            expected[LAST] = (1,)
        outputs: dict[str, tuple[int, ...]] = {"logits": (1, 1, model.vocab_size)}
        for i in range(model.num_layers):
            expected[f"past_key_values.{i}.key"] = (*kv, model.head_dim, window)
            expected[f"past_key_values.{i}.value"] = (*kv, window, model.head_dim)
            outputs[f"present.{i}.key"] = (*kv, model.head_dim, count)
            outputs[f"present.{i}.value"] = (*kv, count, model.head_dim)
        found = {node.name: tuple(node.shape) for node in session.get_outputs()}
        for is_, should in ((inputs, expected), (found, outputs)):
            for tensor in sorted(set(is_) | set(should)):
                if is_.get(tensor) != should.get(tensor):
                    raise FormatError(
                        f"{where}: {tensor} is {is_.get(tensor)}, not {should.get(tensor)}",
                        hint="export the bundle again",
                    )
        return KvShape(model.num_layers, model.num_kv_heads, model.head_dim)


def _count(session: InferenceSession, where: str) -> int:
    """Return the tokens that a graph takes at once."""
    for node in session.get_inputs():
        if node.name == "input_ids" and len(node.shape) == 2 and isinstance(node.shape[1], int):
            return int(node.shape[1])
    raise FormatError(f"{where}: its input_ids have no fixed shape", hint="export the bundle again")


def _local_window(session: InferenceSession, where: str) -> int:
    text = session.get_modelmeta().custom_metadata_map.get(LOCAL_WINDOW, "")
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= MAX_WINDOW):
        raise FormatError(f"{where}: {LOCAL_WINDOW} {text[:40]!r} is no number of positions")
    return int(text)


class Window(Positions):
    """Keys ``[1, kv, hd, W]`` and values ``[1, kv, W, hd]`` of every layer, for one sequence.

    Args:
        shape: Of the graphs.
        size: W, the positions that the graphs see.
        context: Positions to hold, at most W.
    """

    def __init__(self, shape: KvShape, size: int, context: int) -> None:
        from onnxruntime import OrtValue

        super().__init__(context)
        self._keys = np.zeros((shape.layers, 1, shape.heads, shape.width, size), np.float32)
        self._values = np.zeros((shape.layers, 1, shape.heads, size, shape.width), np.float32)
        self._bound = {name: OrtValue.ortvalue_from_numpy(part) for name, part in self.arrays().items()}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return every buffer by the name of its input; positions that are not filled hold what was there."""
        pairs = (("key", self._keys), ("value", self._values))
        return {f"past_key_values.{i}.{kind}": part for kind, parts in pairs for i, part in enumerate(parts)}

    def bind(self, binding: IOBinding) -> None:
        """Bind every buffer as the past of a graph."""
        for name, value in self._bound.items():
            binding.bind_ortvalue_input(name, value)

    def append(self, keys: FloatArray, values: FloatArray, count: int) -> None:
        """Take the first ``count`` of the new ``keys [L, 1, kv, hd, S]`` and ``values [L, 1, kv, S, hd]``."""
        start, stop = self.length, self.length + count
        self._keys[..., start:stop] = keys[..., :count]
        self._values[..., start:stop, :] = values[..., :count, :]
        self.length = stop

    def close(self) -> None:
        """Free the buffers."""
        self._bound.clear()


@dataclass(frozen=True)
class _Bound:
    """A graph with its inputs and outputs in arrays that every run uses again."""

    session: InferenceSession
    binding: IOBinding
    inputs: dict[str, NDArray[np.generic]]
    logits: FloatArray
    keys: FloatArray
    values: FloatArray

    @property
    def count(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


class WindowDecoder:
    """Feeds tokens of one sequence through any of the stages.

    Args:
        sessions: Of the bundle; shared with other decoders.
        context: Positions to hold, at most those of the graphs' window.
    """

    def __init__(self, sessions: WindowSessions, *, context: int) -> None:
        model = sessions.model
        self.cache = Window(sessions.kv_shape, model.context_length, context)
        self._sessions = sessions
        self._bound: dict[tuple[int, bool], _Bound] = {}

    @property
    def length(self) -> int:
        """Positions fed so far."""
        return self.cache.length

    def step(self, token_id: int, stage: int) -> FloatArray:
        """Feed one token.

        Returns:
            Logits [vocab] float32 of the next one, a view that the next step overwrites.
        """
        return self._run([token_id], stage, prefill=False)

    def feed(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed several tokens, one after the other: the graphs give one row of logits a run.

        Returns:
            Logits [len(ids), vocab] float32 of the token after each.
        """
        return np.stack([self.step(i, stage).copy() for i in ids])

    def prefill(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed a prompt of at least one token, in pieces.

        Returns:
            Logits [vocab] float32 of the token after the last.
        """
        size = self._graph(stage, prefill=True).count
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            row = self._run(piece, stage, prefill=len(piece) > 1)
        return row.copy()

    def feeds(self, ids: Sequence[int], stage: int, *, prefill: bool) -> dict[str, NDArray[np.generic]]:
        """Return what a graph would be given for these tokens, copied, without running it (for calibration)."""
        bound = self._graph(stage, prefill=prefill)
        self._fill(bound.inputs, ids)
        return {name: array.copy() for name, array in (bound.inputs | self.cache.arrays()).items()}

    def close(self) -> None:
        """Free the buffers."""
        self._bound.clear()
        self.cache.close()

    def _graph(self, stage: int, *, prefill: bool) -> _Bound:
        key = (stage, prefill)
        if key not in self._bound:
            self._bound[key] = self._bind(
                self._sessions.prefill(stage) if prefill else self._sessions.get(stage)
            )
        return self._bound[key]

    def _bind(self, session: InferenceSession) -> _Bound:
        from onnxruntime import OrtValue

        binding = session.io_binding()
        self.cache.bind(binding)
        inputs: dict[str, NDArray[np.generic]] = {}
        for node in session.get_inputs():
            if not node.name.startswith("past_key_values."):
                kind = np.int32 if node.type == "tensor(int32)" else np.float32
                inputs[node.name] = np.zeros(node.shape, kind)
                binding.bind_ortvalue_input(node.name, OrtValue.ortvalue_from_numpy(inputs[node.name]))
        shapes = {node.name: tuple(node.shape) for node in session.get_outputs()}
        layers = self._sessions.kv_shape.layers
        logits = np.zeros(shapes["logits"], np.float32)
        keys = np.zeros((layers, *shapes["present.0.key"]), np.float32)
        values = np.zeros((layers, *shapes["present.0.value"]), np.float32)
        binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
        for i in range(layers):
            binding.bind_ortvalue_output(f"present.{i}.key", OrtValue.ortvalue_from_numpy(keys[i]))
            binding.bind_ortvalue_output(f"present.{i}.value", OrtValue.ortvalue_from_numpy(values[i]))
        return _Bound(session, binding, inputs, logits, keys, values)

    def _run(self, ids: Sequence[int], stage: int, *, prefill: bool) -> FloatArray:
        bound, count = self._graph(stage, prefill=prefill), len(ids)
        total = self.cache.after(count)
        self._fill(bound.inputs, ids)
        if self._sessions.device is not None:  # what was bound was copied there, as it was then
            self.cache.bind(bound.binding)
            for name, array in bound.inputs.items():
                bound.binding.bind_cpu_input(name, array)
        self._sessions.run(bound.session, bound.binding, stage=stage, position=total - 1)
        self.cache.append(bound.keys, bound.values, count)
        row: FloatArray = bound.logits[0, 0]
        return row

    def _fill(self, inputs: dict[str, NDArray[np.generic]], ids: Sequence[int]) -> None:
        """Write what says which tokens come next, and where they are."""
        count, start = len(ids), self.cache.length
        inputs["input_ids"][0, :count] = ids
        inputs["input_ids"][0, count:] = 0
        positions = np.arange(start, start + inputs["input_ids"].shape[1])
        inputs["position_ids"][0] = np.minimum(positions, self._sessions.model.context_length - 1)
        for name in (BIAS, LOCAL_BIAS):
            if name in inputs:
                local = self._sessions.local_window if name == LOCAL_BIAS else None
                _fill_bias(inputs[name][0, 0], start, local)
        if LAST in inputs:
            inputs[LAST][0] = count - 1


def _fill_bias(bias: NDArray[np.generic], start: int, local: int | None) -> None:
    """Write 0 where token s of this run sees a position, and a large negative number elsewhere.

    Args:
        bias: ``[S, W + S]``.
        start: Positions filled: those below it are seen, and of the new ones those up to s.
        local: How many positions a token sees with itself, None for all.
    """
    count = len(bias)
    window = bias.shape[1] - count
    here = start + np.arange(count)[:, None]
    there = np.concatenate([np.arange(window), start + np.arange(count)])
    filled = np.arange(window + count) < start
    filled[window:] = True
    seen = filled & (there <= here)
    if local is not None:
        seen &= there > here - local
    bias[:] = np.where(seen, np.float32(0), np.float32(UNSEEN))
