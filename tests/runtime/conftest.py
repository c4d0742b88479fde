"""A bundle of stories260k: real text out of a megabyte, with the torch model of each stage beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_runtime import load, manifest
from flrc_runtime.engine import Model
from tests.conftest import unchanged

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
LESS = 16  # ranks stage 1 lacks: visibly another model, still English


@dataclass(frozen=True)
class Stories:
    """A bundle folder and the torch model of each stage."""

    folder: Path
    stages: tuple[Any, ...]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    """Two fp32 stages: all ranks, which is the model itself, and 16 ranks fewer in most projections."""
    import torch

    import flrc_edge
    from flrc_edge import checkpoint
    from flrc_edge.chunks import chunks_of
    from flrc_edge.compression import model_info
    from flrc_exporters.bundle import export

    torch.set_num_threads(1)
    source = flrc_edge.open_model(str(STORIES))
    plans, factors = [], {}
    for projection in source.config.projections():
        most = min(projection.shape)
        less = most if most <= 32 else most - LESS  # the keys and values keep theirs
        plans.append(manifest.ProjectionPlan(projection.name, projection.shape, (most, less)))
        weight = source.model.get_submodule(projection.name).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        factors[projection.name] = chunks_of(u * s, v, plans[-1])
    content = manifest.Manifest(
        kind="checkpoint",
        model=model_info("stories260k", source.config),
        plan=manifest.RankPlan("uniform", (1.0, 0.8), tuple(plans)),
        schedule=manifest.Schedule((8,)),
        dtype="float32",
        factorization="one-sided",
    )
    folder = tmp_path_factory.mktemp("runtime")
    checkpoint.write(folder / "checkpoint", content, source=source, factors=factors)
    export(folder / "checkpoint", folder / "stories", dtype="fp32")
    stages = tuple(flrc_edge.load(folder / "checkpoint", stage=stage) for stage in (0, 1))
    with unchanged(folder / "stories", stages[0]):
        yield Stories(folder / "stories", stages)


@pytest.fixture(scope="session")
def model(bundle: Stories) -> Model:
    """The bundle, loaded once with one thread."""
    return load(bundle.folder, threads=1)


@pytest.fixture(scope="session")
def talking(bundle: Stories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a chat template, which stories260k has none of; do not write there."""
    folder = tmp_path_factory.mktemp("chat") / "talking"
    shutil.copytree(bundle.folder, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    manifest.seal(folder, manifest.read(folder))
    return folder


@pytest.fixture(scope="session")
def positions() -> Any:
    """Keys and values of every layer of a cache as ``[kv, positions, head_dim]``."""

    def of(cache: Any) -> list[Any]:
        found = []
        for name, buffer in cache._buffers.items():
            blocks = buffer.numpy()[0].view(np.float32)
            heads, count = blocks.shape[:2]
            if name.endswith("key"):  # positions are last
                blocks = blocks.reshape(heads, count, -1, 16).swapaxes(2, 3)
            found.append(blocks.reshape(heads, count * 16, -1))
        return found

    return of


@pytest.fixture(scope="session")
def stock(bundle: Stories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in onnxruntime's own operators."""
    from flrc_exporters.bundle import export

    folder = tmp_path_factory.mktemp("stock") / "stories"
    export(bundle.folder.parent / "checkpoint", folder, dtype="fp32", stock=True)
    return folder


@pytest.fixture
def copied(bundle: Stories, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
