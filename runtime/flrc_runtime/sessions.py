"""One onnxruntime session per stage, opened on first use and shared by every generator of a model."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FlrcError, FormatError, NumericalError, UsageError
from .files import resolve_inside
from .free_memory import trim
from .graph_file import check_graph_file
from .kernels import VERSION, register
from .kv_cache import BLOCK_POSITIONS, KvShape
from .manifest import Manifest
from .providers import CPU, Provider, add_provider, device_of, usable

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, NodeArg

OLDEST_ONNXRUNTIME = (1, 24, 2)  # earlier ones let a graph read weights outside its own folder
_log = logging.getLogger(__name__)
NOT_FINITE = "a value that is not finite"  # how an error of our own operators ends
LOGITS_START = "logits_start"  # of the graphs: the first position that logits are wanted of
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)\Z")


def check_onnxruntime() -> None:
    """Refuse an onnxruntime that must not open a graph.

    Raises:
        FlrcError: It is too old.
    """
    import onnxruntime

    version = tuple(int(n) for n in re.findall(r"\d+", onnxruntime.__version__)[:3])
    if version < OLDEST_ONNXRUNTIME:
        raise FlrcError(
            f"onnxruntime {onnxruntime.__version__} is too old", hint="pip install 'onnxruntime>=1.24.2'"
        )


def loading_error(error: Exception, folder: Path) -> str:
    """Return why onnxruntime does not open a graph of ``folder``, in one line without that path."""
    reason = str(error).split("] : ")[-1].split("\n")[0].replace(f"{folder}/", "")
    return reason[:300]


class StageSessions:
    """The graphs of a bundle.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        threads: Of one operator; None for onnxruntime's own choice.
        providers: Execution providers (providers.py), in the order of preference; when the first of them cannot run a
            graph, the next one does, and a line says so.
        trace: Beginning of the path that onnxruntime's profiler writes to, for every session; None: no profiling.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[str | Provider],
        trace: Path | None = None,
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or threads < 1):
            raise UsageError(f"threads {threads!r} is not a positive integer")
        self._folder = folder
        self._manifest = manifest
        self._threads = threads
        self._providers = usable(providers)
        self._trace = trace
        # Held while a graph runs. A server puts a lock here, so that sequences get the machine in turn.
        self.turns: AbstractContextManager[object] = nullcontext()
        self._open: dict[str, InferenceSession] = {}
        self._shape: KvShape | None = None
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Number of stages of the bundle, opened or not."""
        return len(self._manifest.stages)

    @property
    def own(self) -> bool:
        """Whether the graphs consist of our own operators."""
        return self._manifest.operators > 0

    @property
    def device(self) -> str | None:
        """onnxruntime's name of the memory that the first provider works in; None where that is the host's."""
        return device_of(self._providers[0])

    @property
    def kv_shape(self) -> KvShape:
        """Shape of the KV cache, the same for every stage."""
        if self._shape is None:
            self.get(0)
        assert self._shape is not None
        return self._shape

    def get(self, stage: int) -> InferenceSession:
        """Return the session of a stage, opening it if it is not.

        Raises:
            FormatError: The graph does not load or has other inputs and outputs than its manifest says.
        """
        return self._get(self._manifest.stages[stage].graph)

    def _get(self, name: str) -> InferenceSession:
        session = self._open.get(name)
        if session is not None:
            return session
        with self._lock:
            if name not in self._open:
                session = self._load(name)
                shape = self._checked(session, name)
                if self._shape not in (None, shape):
                    raise FormatError(
                        f"{self._folder.name}/{name}: its {shape} differs from {self._shape} of another stage"
                    )
                self._shape = shape
                self._open[name] = session
                trim()
            return self._open[name]

    def _checked(self, session: InferenceSession, name: str) -> KvShape:
        return check_graph(session, self._manifest, f"{self._folder.name}/{name}")

    def run(self, session: InferenceSession, binding: IOBinding, *, stage: int, position: int) -> None:
        """Run a graph whose inputs and outputs are bound, in this sequence's turn.

        Args:
            session: Of the stage.
            binding: Of the session.
            stage: Named in an error.
            position: Of the last token fed, named in an error.

        Raises:
            NumericalError: A number in it is not finite.
            FlrcError: It failed.
        """
        try:
            with self.turns:
                session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base of their own
            reason = str(error).split("Status Message: ")[-1].split("\n")[0]
            if reason.endswith(NOT_FINITE):
                raise NumericalError(
                    f"stage {stage} met a number that is not finite at position {position}",
                    hint="get the bundle again, or export it again",
                ) from None
            raise FlrcError(f"stage {stage} failed at position {position}: {reason}") from error

    def _load(self, name: str) -> InferenceSession:
        check_onnxruntime()
        path = resolve_inside(self._folder, name)
        check_graph_file(path, self._manifest.weight_sizes(), self._manifest.graph_form())
        while True:
            try:
                return self._session(path)
            except Exception as error:
                reason = loading_error(error, self._folder)
                first, *rest = self._providers
                if first.name == CPU or not rest:
                    raise FormatError(
                        f"{self._folder.name}/{name} does not load in onnxruntime: {reason}",
                        hint="run flrc-edge verify on the bundle, or export it again",
                    ) from error
                _log.warning("%s cannot run %s (%s); using %s", first.name, name, reason, rest[0].name)
                self._providers = usable(rest)

    def _session(self, graph: Path) -> InferenceSession:
        import onnxruntime

        _register_arena()
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.log_severity_level = 4  # what goes wrong is raised; onnxruntime would print it as well
        # Else the threads of the stage left behind spin on against those of the next one: a move then costs more
        # than half a decode step instead of a twentieth (`flrc-edge bench`).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._manifest.operators:
            if self._manifest.operators != VERSION:
                raise FormatError(
                    f"{self._folder.name} needs version {self._manifest.operators} of the operators, "
                    f"this runtime has {VERSION}",
                    hint="upgrade flrc-edge or export the bundle again",
                )
            register(options)
        if self._trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._trace)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if [p.name for p in self._providers] == [CPU]:
            return onnxruntime.InferenceSession(str(graph), options, providers=[CPU])
        for provider in self._providers:
            if provider.name != CPU:  # which onnxruntime adds by itself, as the last
                add_provider(options, provider)
        return onnxruntime.InferenceSession(str(graph), options)


@cache
def _register_arena() -> None:
    """Have all sessions of this process take activations from one arena, which grows by what is asked for.

    Each would keep one of its own, as large as its longest prompt needed and doubled at every step.
    """
    from onnxruntime import (
        OrtAllocatorType,
        OrtArenaCfg,
        OrtMemoryInfo,
        OrtMemType,
        create_and_register_allocator,
    )

    memory = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
    with suppress(Exception):  # another library of this process registered one already: then that is shared
        create_and_register_allocator(memory, OrtArenaCfg({"arena_extend_strategy": 1}))


def check_graph(session: InferenceSession, manifest: Manifest, where: str) -> KvShape:
    """Compare a graph's inputs and outputs with what the runtime feeds and the manifest says.

    Returns:
        The shape of its KV cache; its head_dim is the graph's own, which may be padded beyond the model's.

    Raises:
        FormatError: A tensor is missing, left over, or of another type or shape.
    """
    model = manifest.model
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    layers = range(model.num_layers)
    past = {f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")}
    present = {f"present.{i}.{kind}" for i in layers for kind in ("key", "value")}
    fed = {"input_ids", "attention_mask", *([LOGITS_START] if manifest.operators else [])}
    for found, expected, kind in (
        (inputs, fed | past, "inputs"),
        (outputs, {"logits"} | present, "outputs"),
    ):
        if set(found) != expected:
            names = ", ".join(sorted(set(found) ^ expected)[:3])
            raise FormatError(
                f"{where}: its {kind} are not those of a decoder of {len(layers)} layers ({names})"
            )
    for node in (*inputs.values(), *outputs.values()):
        expected_type = _type(node.name, manifest)
        if node.type != expected_type:
            raise FormatError(f"{where}: {node.name} is {node.type}, not {expected_type}")
    if outputs["logits"].shape[-1] != model.vocab_size:
        found_size = outputs["logits"].shape[-1]
        raise FormatError(f"{where}: logits over {found_size} tokens, the vocabulary has {model.vocab_size}")
    shapes = {_kv_shape(node, manifest) for node in inputs.values() if _PAST.match(node.name)}
    if len(shapes) != 1:
        raise FormatError(f"{where}: layers of different KV heads are not supported")
    return shapes.pop()


def _type(name: str, manifest: Manifest) -> str:
    """Return onnxruntime's name of the type of an input or output."""
    if name in ("input_ids", "attention_mask", LOGITS_START):
        return "tensor(int64)"
    return "tensor(float)" if name == "logits" or not manifest.operators else "tensor(uint8)"


def _kv_shape(node: NodeArg, manifest: Manifest) -> KvShape:
    """Return the cache shape of one layer; a symbolic dimension is what the manifest says."""
    model = manifest.model
    _, heads, _, width = node.shape if len(node.shape) == 4 else (None,) * 4
    return KvShape(
        layers=model.num_layers,
        heads=heads if isinstance(heads, int) else model.num_kv_heads,
        width=width if isinstance(width, int) else model.head_dim,
        positions=BLOCK_POSITIONS if manifest.operators else 1,
    )
