"""Compile a static bundle for a Qualcomm NPU ahead of time: every graph becomes a context binary.

onnxruntime's QNN plug-in (package onnxruntime-qnn) holds the compiler for x86-64 and a simulator of the NPU. The
binaries of all graphs may share one copy of the weights; the simulator runs only binaries that do not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flrc_runtime import load
from flrc_runtime import manifest as manifests
from flrc_runtime.errors import UsageError
from flrc_runtime.files import write_json
from flrc_runtime.graph_file import check_graph_file
from flrc_runtime.manifest import CARD, FILE_NAME, Manifest, prefill_graph
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import check_output_folder, published_folder
from flrc_runtime.providers import QNN, Provider, usable
from flrc_runtime.window_decoder import WindowSessions

from .activation_quantization import calibration_feeds, quantize_graph
from .node_placement import Placement, open_placed

PLACEMENT = "placement.json"
# Name -> (model number, version of the Hexagon architecture), as Qualcomm's SDK numbers them. Of these, the
# compiler takes every node in float16; of SM8635 (68, 73) and SM8735 (85, 79) it takes no product.
SOCS = {
    "SM8450": (36, 69),  # Snapdragon 8 Gen 1
    "SM8475": (42, 69),  # 8+ Gen 1
    "SM8550": (43, 73),  # 8 Gen 2
    "SM8650": (57, 75),  # 8 Gen 3
    "SM8750": (69, 79),  # 8 Elite
    "SM8850": (87, 81),  # 8 Elite Gen 5
}


def qnn_provider(soc: str) -> Provider:
    """Return the provider for a SoC of :data:`SOCS`, in float16.

    Raises:
        UsageError: The SoC is unknown, or there is no QNN plug-in.
    """
    if soc.upper() not in SOCS:
        raise UsageError(f"SoC {soc!r} is unknown", hint=f"known: {', '.join(SOCS)}")
    model, architecture = SOCS[soc.upper()]
    options = {"soc_model": str(model), "htp_arch": str(architecture), "enable_htp_fp16_precision": "1"}
    return usable([Provider(QNN, options)])[0]


def compile_static(
    bundle: Path,
    output: Path,
    *,
    soc: str,
    share: bool = True,
    quantized: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Manifest, dict[str, Placement]]:
    """Compile every graph of a static bundle.

    Args:
        bundle: What ``export --graph static`` wrote.
        output: The folder to write; published by one rename, or left as it was.
        soc: Name of the SoC.
        share: Let all binaries share one copy of the weights, which phones can run and the x86-64 simulator cannot.
        quantized: What :func:`quantize_static` wrote of this bundle: then weights are int8 and activations 16 bits;
            without, both are float16.
        overwrite: Replace an earlier folder.
        progress: Called with what is being done, graphs done and graphs in all.

    Returns:
        The manifest of the new folder, and where the nodes of each graph run.

    Raises:
        UsageError: The SoC is unknown, there is no QNN plug-in, or the bundle was compiled before.
        FlrcError: The compiler refuses a graph.
    """
    provider = qnn_provider(soc)
    check_output_folder(output, overwrite=overwrite)
    content = manifests.verify(bundle, "static")
    if "weights.bin" not in content.files:
        raise UsageError(f"{bundle.name} is compiled already", hint="give the bundle it was compiled from")
    graphs = [name for stage in content.stages for name in (stage.graph, prefill_graph(stage.graph))]
    placements: dict[str, Placement] = {}
    with published_folder(output, overwrite=overwrite) as folder:
        sessions = []  # the compiler shares weights among sessions that are open together
        for i, name in enumerate(graphs):
            entries = {
                "ep.context_enable": "1",
                "ep.context_embed_mode": "0",
                "ep.context_file_path": str(folder / name),
                "ep.share_ep_contexts": str(int(share)),
                "ep.stop_share_ep_contexts": str(int(share and i + 1 == len(graphs))),
            }
            source = (quantized or {}).get(name, bundle / name)
            session, placements[name] = open_placed(source, provider, entries)
            if share:
                sessions.append(session)
            if progress is not None:
                progress("compile", i + 1, len(graphs))
        del sessions
        for name in content.files:
            if name not in (*graphs, "weights.bin", FILE_NAME, CARD):
                shutil.copyfile(bundle / name, folder / name)
        report = {
            name: {"nodes": p.nodes, "npu": p.placed, "elsewhere": [list(pair) for pair in p.elsewhere]}
            for name, p in placements.items()
        }
        write_json(folder / PLACEMENT, {"soc": soc.upper(), "graphs": report})
        written = replace(content, files={}, dtype="a16w8" if quantized else content.dtype)
        write_card(folder, written)
        sealed = manifests.seal(folder, written)
        for name in graphs:
            check_graph_file(folder / name, sealed.weight_sizes(), "static")
        return sealed, placements


def quantize_static(
    bundle: Path,
    windows: Sequence[Sequence[int]],
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Path]:
    """Write every graph of a static bundle with int8 weights and 16-bit activations (activation_quantization.py).

    Args:
        bundle: What ``export --graph static`` wrote.
        windows: Token ids of texts to calibrate on.
        folder: Where to write.
        progress: Called with what is being done, graphs done and graphs in all.

    Returns:
        The new graph of each, by the name of the old one.
    """
    model = load(bundle)
    assert isinstance(model.sessions, WindowSessions)
    found: dict[str, Path] = {}
    for stage, info in enumerate(model.manifest.stages):
        chunk = model.sessions.tokens_at_once(stage)
        for name, prefill in ((info.graph, None), (prefill_graph(info.graph), chunk)):
            feeds = calibration_feeds(model, windows, stage, prefill=prefill)
            found[name] = folder / name
            quantize_graph(bundle / name, found[name], feeds)
            if progress is not None:
                progress("quantize", len(found), 2 * len(model.manifest.stages))
    return found
