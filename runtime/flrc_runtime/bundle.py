"""Open a bundle folder: manifest, tokenizer and stage graphs become a :class:`~flrc_runtime.engine.Model`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import manifest as manifest_format
from .engine import Model
from .errors import UsageError
from .files import resolve_inside
from .manifest import Manifest
from .policy import checked_stage
from .providers import CPU, QNN, Provider, usable
from .sessions import StageSessions
from .tokenizer import Tokenizer
from .window_decoder import WindowSessions

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest fits its files; no graph is loaded yet.

    Args:
        folder: Where it is.
        manifest: Its ``flrc.json``.
        graphs: One path per stage.
    """

    folder: Path
    manifest: Manifest
    graphs: tuple[Path, ...]


def open_bundle(folder: str | Path) -> Bundle:
    """Read the manifest and find the graphs.

    Raises:
        VerificationError: The folder is not a bundle, or a file is missing or has another size.
    """
    folder = Path(folder)
    manifest = manifest_format.read(folder, kind="bundle")
    return Bundle(folder, manifest, tuple(resolve_inside(folder, stage.graph) for stage in manifest.stages))


def load(
    bundle: str | Path,
    *,
    context: int | None = None,
    threads: int | None = None,
    stages: Sequence[int] | None = None,
    providers: Sequence[str | Provider] = (CPU,),
) -> Model:
    """Load a bundle.

    Args:
        bundle: The folder ``flrc-edge export`` wrote.
        context: Tokens of prompt and answer together; None for the model's own length, at most 2048.
        threads: Of one operator; None for onnxruntime's choice.
        stages: To open now, None for all; another one opens when a policy first asks for it.
        providers: Execution providers, in the order of preference: ``cpu``, ``webgpu``, ``qnn`` or onnxruntime's names,
            with options as ``qnn:soc_model=57,htp_arch=75`` (providers.py). ``("webgpu", "cpu")`` goes on with the CPU,
            and says so, where the first is not to be had.

    Raises:
        UsageError: ``context``, ``threads``, a stage or a provider is not possible.
        VerificationError: The folder is not a bundle or is damaged.
    """
    opened = open_bundle(bundle)
    model = opened.manifest.model
    if context is None:
        context = min(model.context_length, DEFAULT_CONTEXT)
    if isinstance(context, bool) or not 2 <= context <= model.context_length:
        raise UsageError(f"context {context!r} is not from 2 to the model's {model.context_length} tokens")
    wanted = range(len(opened.graphs)) if stages is None else stages
    for stage in wanted:
        checked_stage(stage, len(opened.graphs))
    tokenizer = Tokenizer.from_folder(opened.folder)
    providers = usable(providers)
    _check_compiled(opened, [p.name for p in providers])
    kind = WindowSessions if opened.manifest.kind == "static" else StageSessions
    sessions = kind(opened.folder, opened.manifest, threads=threads, providers=providers)
    for stage in wanted:
        sessions.get(stage)
    return Model(opened.manifest, tokenizer, sessions, context=context)


def _check_compiled(bundle: Bundle, providers: Sequence[str]) -> None:
    """Refuse to open what was compiled for an NPU where it cannot run."""
    graphs = [name for name in bundle.manifest.files if name.endswith(".onnx")]
    binaries = bundle.manifest.weight_sizes()
    if "weights.bin" in binaries:
        return
    if QNN not in providers:
        raise UsageError(
            f"{bundle.folder.name} was compiled for a Qualcomm NPU", hint="open it with the provider qnn"
        )
    if len(binaries) < len(graphs) and platform.machine().lower() in ("x86_64", "amd64"):
        raise UsageError(  # its simulator ends the process, with a segmentation fault
            f"the binaries of {bundle.folder.name} share their weights, which the simulator on this machine cannot run",
            hint="export it with --no-share",
        )
