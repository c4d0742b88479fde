"""What all tests share: a cache folder of their own, a process that each leaves as it was, and stories260k compressed
and exported once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Every run explores, in CI too, where hypothesis alone would not; what fails is printed with what repeats it.
hypothesis.settings.register_profile("flrc-edge", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("flrc-edge")
# Before torch is imported: for models this small a second thread costs more than it does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
STORIES = Path(__file__).parent / "data" / "stories260k"
_REAL_CACHE = os.environ.get("FLRC_EDGE_CACHE")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point FLRC_EDGE_CACHE to a temporary folder: no test reads or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLRC_EDGE_CACHE", str(folder))
        yield folder


# Set by pytest; by onnxruntime-genai and torch's compiler when they are imported.
NOT_OF_TESTS = {"$PYTEST_CURRENT_TEST", "$ORT_LIB_PATH", "$TORCHINDUCTOR_CACHE_DIR"}


def process() -> dict[str, Any]:
    """Return what a test may not leave changed in this process: the next one on it is any other."""
    found: dict[str, Any] = {f"${name}": value for name, value in os.environ.items()}
    for name in NOT_OF_TESTS:
        found.pop(name, None)
    paths = tuple(
        path for path in sys.path if "onnxruntime" not in path
    )  # which adds to it when it is imported
    found |= {"folder": Path.cwd(), "recursion limit": sys.getrecursionlimit(), "sys.path": paths}
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        found["torch"] = None
        found["torch: threads"] = torch.get_num_threads()
        found["torch: gradients"] = torch.is_grad_enabled()
        found["torch: dtype"] = torch.get_default_dtype()
    return found


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that changes the process; what it logs and draws does not depend on the tests before it, either."""
    for name in ("", "flrc_edge", "flrc_exporters", "flrc_runtime"):  # command lines set levels
        logging.getLogger(name).setLevel(logging.WARNING if not name else logging.NOTSET)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(getattr(request.config.option, "randomly_seed", None) or 0)
    before = process()
    yield
    after = process()
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if "torch" not in before:  # it was imported in the test
        changed = [name for name in changed if not name.startswith("torch")]
    assert not changed, f"this test left changed: {', '.join(changed)}"


@pytest.fixture
def real_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use the user's own cache, for tests of pulled models."""
    if _REAL_CACHE is None:
        monkeypatch.delenv("FLRC_EDGE_CACHE")
    else:
        monkeypatch.setenv("FLRC_EDGE_CACHE", _REAL_CACHE)
    from flrc_runtime.cache import cache_folder

    return cache_folder()


@contextmanager
def unchanged(folder: Path, model: Any = None) -> Iterator[None]:
    """Fail, after all tests, if one wrote to what they share: a folder's files, a model's weights."""

    def content() -> dict[str, str]:
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
        if model is not None:
            state = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
            found |= {k: hashlib.sha256(v).hexdigest() for k, v in state.items()}
        return found

    before = content()
    yield
    after = content()
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert not changed, f"a test changed what all share, {folder.name}: {', '.join(changed)}"


@dataclass(frozen=True)
class CompressedStories:
    """stories260k in three stages: settings, dense model, checkpoint folder and what ``compress`` returned."""

    settings: Any
    source: Any
    checkpoint: Path
    manifest: Any


@pytest.fixture(scope="session")
def compressed_stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompressedStories]:
    """Compress stories260k, plain, with the defaults a model of 64 features allows; do not write there."""
    import torch

    import flrc_edge
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    torch.set_num_threads(1)
    source = flrc_edge.open_model(str(STORIES))
    settings = Settings(keep=(0.9, 0.8, 0.7), tokens=4096, window=256, rank_step=8, storage="plain")
    folder = tmp_path_factory.mktemp("stories") / "checkpoint"
    manifest = compress(source, folder, settings)
    with unchanged(folder, source.model):
        yield CompressedStories(settings, source, folder, manifest)


@pytest.fixture(scope="session")
def pivoted_stories(
    compressed_stories: CompressedStories, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CompressedStories]:
    """The same three keeps with pivoted storage, boundaries by hand; do not write there."""
    from dataclasses import replace

    from flrc_edge.compression import compress

    settings = replace(compressed_stories.settings, storage="pivoted", boundaries=(8, 16))
    folder = tmp_path_factory.mktemp("pivoted") / "checkpoint"
    source = compressed_stories.source
    manifest = compress(source, folder, settings)
    with unchanged(folder):
        yield CompressedStories(settings, source, folder, manifest)


@pytest.fixture(scope="session")
def stories_bundle(
    compressed_stories: CompressedStories, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The fp32 export of the three stages; do not write there."""
    from flrc_exporters.bundle import export

    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    export(compressed_stories.checkpoint, folder, dtype="fp32")
    with unchanged(folder):
        yield folder


@pytest.fixture
def genai_greedy() -> Callable[[Path, int, list[int], int], list[int]]:
    """Greedy tokens of one stage of a bundle in onnxruntime-genai: (bundle, stage, prompt, tokens) -> tokens."""
    og = pytest.importorskip("onnxruntime_genai")

    def greedy(bundle: Path, stage: int, prompt: list[int], tokens: int) -> list[int]:
        config = og.Config(str(bundle))
        config.overlay(json.dumps({"model": {"decoder": {"filename": f"stage_{stage}.onnx"}}}))
        model = og.Model(config)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        result = []
        while not generator.is_done():
            generator.generate_next_token()
            result.append(int(generator.get_next_tokens()[0]))
        return result

    return greedy
