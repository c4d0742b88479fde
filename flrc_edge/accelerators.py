"""Where an accelerator runs the nodes of a bundle, and how far its logits are from those of the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import machine
from typing import Any, Literal

import numpy as np

from flrc_edge.errors import FlrcError, UsageError
from flrc_edge.texts import read_text
from flrc_exporters.node_placement import Placement, open_placed
from flrc_exporters.qnn import compile_static, qnn_provider, quantize_static
from flrc_runtime import load
from flrc_runtime import manifest as manifests
from flrc_runtime.engine import Model
from flrc_runtime.manifest import Manifest, prefill_graph
from flrc_runtime.providers import QNN, usable

TEXT, CALIBRATION = "austen-heldout", ("wikitext2", "austen")  # built-in texts
_PACKAGES = {"QNNExecutionProvider": "onnxruntime-qnn", "WebGpuExecutionProvider": "onnxruntime-ep-webgpu"}
Precision = Literal["fp16", "a16w8"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Graph:
    """One graph of a bundle on an accelerator.

    Args:
        name: Of its file.
        nodes: Number of all nodes.
        placed: Of those on the accelerator.
        elsewhere: Operators of the others.
        binary_bytes: Of what it is compiled to, alone; 0 where nothing is compiled ahead of time.
    """

    name: str
    nodes: int
    placed: int
    elsewhere: tuple[str, ...]
    binary_bytes: int


@dataclass(frozen=True)
class OnAccelerator:
    """A bundle on an accelerator, beside the same graphs on the CPU.

    Args:
        model: Name of the model.
        dtype: Number format of the bundle.
        provider: Name of the execution provider.
        options: Of the provider.
        window: Positions of the graphs, or the context.
        graphs: Where their nodes run.
        shared_bytes: Of all binaries with one copy of the weights; 0 where nothing is compiled ahead of time.
        tokens: Given tokens (teacher forcing), one at a time.
        stages: The stage of each.
        relative_l2: ``‖logits − CPU's‖ / ‖CPU's‖`` over all tokens.
        top1: Share of tokens whose best next token is that of the CPU.
        ms_per_token: Median, on this machine.
        conditions: Machine and versions.
    """

    model: str
    dtype: str
    provider: str
    options: dict[str, str]
    window: int
    graphs: tuple[Graph, ...]
    shared_bytes: int
    tokens: int
    stages: tuple[int, ...]
    relative_l2: float
    top1: float
    ms_per_token: float
    conditions: str

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)


def measure(
    bundle: Path,
    provider: str,
    *,
    soc: str | None,
    tokens: int,
    precision: Precision = "fp16",
    progress: Progress | None = None,
) -> OnAccelerator:
    """Feed given tokens through all stages, an equal number each, on an accelerator and on the CPU.

    Args:
        bundle: For QNN a static one, which is compiled into a temporary folder; any other provider takes both kinds.
        provider: As :meth:`flrc_runtime.providers.Provider.parse` reads it.
        soc: For QNN, the name of the SoC.
        tokens: How many, of Austen's "Persuasion".
        precision: For QNN: ``fp16``, or ``a16w8`` (int8 weights, 16-bit activations).
        progress: Called with what is being done, steps done and steps in all.

    Raises:
        UsageError: There is no such provider, SoC or kind of bundle.
        FlrcError: The text is shorter, or a graph does not run.
    """
    chosen = qnn_provider(soc) if soc is not None else usable([provider])[0]
    if chosen.name == QNN and soc is None:
        raise UsageError("QNN compiles for one SoC", hint="for example --soc SM8650")
    content = manifests.verify(bundle, "bundle")
    names = [stage.graph for stage in content.stages]
    if content.kind == "static":
        names += [prefill_graph(name) for name in names]
    reference = load(bundle)
    ids = reference.tokenizer.encode(read_text(TEXT)[: 8 * tokens + 64])[:tokens]
    if len(ids) < tokens or tokens >= reference.context:
        raise FlrcError(
            f"{tokens} tokens do not fit", hint=f"at most {min(len(ids), reference.context - 1)} do"
        )
    count = len(content.stages)
    stages = [i * count // tokens for i in range(tokens)]
    wanted, _ = _forced(reference, ids, stages, None)
    with tempfile.TemporaryDirectory(prefix="flrc-edge-") as scratch:
        if chosen.name == QNN:
            quantized = None
            if precision == "a16w8":
                windows = calibration_windows(reference)
                quantized = quantize_static(bundle, windows, Path(scratch), progress=progress)
            alone, placements = compile_static(
                bundle,
                Path(scratch) / "alone",
                soc=str(soc),
                share=False,
                quantized=quantized,
                progress=progress,
            )
            together, _ = compile_static(
                bundle, Path(scratch) / "together", soc=str(soc), quantized=quantized, progress=progress
            )
            sizes, shared = _binaries(alone), sum(together.weight_sizes().values())
            found, times = _forced(load(Path(scratch) / "alone", providers=[chosen]), ids, stages, progress)
        else:
            placements = {name: open_placed(bundle / name, chosen)[1] for name in names}
            sizes, shared = {}, 0
            found, times = _forced(load(bundle, providers=[chosen]), ids, stages, progress)
    return OnAccelerator(
        model=content.model.name,
        dtype=content.dtype,
        provider=chosen.name,
        options={"soc": soc.upper(), "precision": precision} if soc else dict(chosen.options),
        window=reference.context,
        graphs=tuple(_graph(name, placements[name], sizes.get(name, 0)) for name in sorted(names)),
        shared_bytes=shared,
        tokens=tokens,
        stages=tuple(stages),
        relative_l2=float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
        top1=float((found.argmax(1) == wanted.argmax(1)).mean()),
        ms_per_token=1e3 * float(np.median(times)),
        conditions=f"{machine()}, onnxruntime {version('onnxruntime')}, "
        f"{_PACKAGES.get(chosen.name, '')} {version(_PACKAGES.get(chosen.name, 'onnxruntime'))}",
    )


def calibration_windows(model: Model) -> list[list[int]]:
    """Return token ids of the built-in calibration texts, at most 96 of each, for ranges of activations."""
    most = min(96, model.context - 1)
    return [model.tokenizer.encode(read_text(name)[:2000])[:most] for name in CALIBRATION]


def _forced(
    model: Model, ids: Sequence[int], stages: Sequence[int], progress: Progress | None
) -> tuple[Any, list[float]]:
    """Return logits ``[len(ids), vocab]`` and the seconds of every token."""
    rows, times = [], []
    decoder = model.decoder()
    try:
        for i, (token, stage) in enumerate(zip(ids, stages, strict=True)):
            begun = time.perf_counter()
            rows.append(decoder.step(token, stage).copy())
            times.append(time.perf_counter() - begun)
            if progress is not None:
                progress("run", i + 1, len(ids))
    finally:
        decoder.close()
    return np.stack(rows), times


def _graph(name: str, where: Placement, size: int) -> Graph:
    return Graph(name, where.nodes, where.placed, tuple(sorted(op for _, op in where.elsewhere)), size)


def _binaries(content: Manifest) -> dict[str, int]:
    """Return the bytes of the binary of every graph."""
    return {f"{name.removesuffix('_qnn.bin')}.onnx": size for name, size in content.weight_sizes().items()}
