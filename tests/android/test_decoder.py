"""The Java engine decodes a bundle as the Python runtime does: logits, tokens, text, across moves between stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flrc_runtime
from flrc_exporters.bundle import export
from flrc_runtime import manifest
from flrc_runtime.errors import NumericalError
from tests.android.vectors import GREEDY, ask, check_answers, check_logits
from tests.golden.make import IDS, STAGES
from tests.golden.test_golden import FOLDERS
from tests.golden.test_golden import name as name_of


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_logits_and_answers_of_stories(
    java_decoder: Callable[..., Any], compressed_stories: Any, tmp_path: Path, dtype: Any, stock: bool
) -> None:
    bundle = tmp_path / "bundle"
    export(compressed_stories.checkpoint, bundle, dtype=dtype, stock=stock)
    random = np.random.default_rng(0)
    ids = random.integers(3, 500, 96).tolist()
    stages = random.integers(0, 3, 96).tolist()
    check_logits(java_decoder, bundle, ids, stages, tmp_path)
    check_answers(java_decoder, bundle, 60)


@pytest.mark.parametrize("stock", [False, True])
def test_a_prompt_of_several_chunks(
    java_decoder: Callable[..., Any], compressed_stories: Any, tmp_path: Path, stock: bool
) -> None:
    bundle, prompt = tmp_path / "bundle", "One day a little dog saw a big red bird and said hello. " * 18
    export(compressed_stories.checkpoint, bundle, stock=stock)
    request = GREEDY | {"context": 512, "prompt": prompt, "stages": [0, 1], "max_tokens": 16}
    model = flrc_runtime.load(bundle, threads=1, context=512)
    assert len(model.tokenizer.encode(prompt)) > 256
    policy = flrc_runtime.ScriptedStages((0, 1))
    wanted = flrc_runtime.generate(model, prompt, max_tokens=16, chat=False, policy=policy)
    (answer,) = ask(java_decoder, bundle, request)
    assert answer["ids"] == list(wanted.token_ids)


def test_logits_that_are_not_finite(
    java_decoder: Callable[..., Any], stories_bundle: Path, tmp_path: Path
) -> None:
    """All weights become NaN; our own operators say so, at the same position as in Python."""
    bundle = Path(shutil.copytree(stories_bundle, tmp_path / "bundle"))
    content = manifest.read(bundle)
    (bundle / "weights.bin").write_bytes(b"\xff" * content.files["weights.bin"].size)
    manifest.seal(bundle, content)
    model = flrc_runtime.load(bundle, threads=1)
    with pytest.raises(NumericalError) as wanted:
        flrc_runtime.generate(model, "Once upon a time", max_tokens=2, chat=False)
    line = json.dumps(GREEDY | {"context": 64, "prompt": "Once upon a time", "stages": [0], "max_tokens": 2})
    done = java_decoder("DecoderCheck", bundle, stdin=line + "\n")
    assert (done.returncode, done.stderr) == (3, f"Error: {wanted.value}\n")


@pytest.mark.parametrize(("exported", "chosen"), [(4, 0), (0, 4)])
def test_the_accuracy_level_is_chosen_on_the_device(
    java_decoder: Callable[..., Any], compressed_stories: Any, tmp_path: Path, exported: Any, chosen: Any
) -> None:
    given, twin, out = tmp_path / "given", tmp_path / "twin", tmp_path / "logits.bin"
    for folder, level in ((given, exported), (twin, chosen)):
        export(compressed_stories.checkpoint, folder, dtype="int4", accuracy_level=level, stock=True)
    ids, stages = list(range(3, 35)), [i % 3 for i in range(32)]
    request = {"context": 33, "feed": ids, "stages": stages, "out": str(out)}
    found = {}
    for chosen_level in (None, chosen):
        ask(java_decoder, given, request, level=chosen_level)
        found[chosen_level] = np.fromfile(out, ">f4")
    ask(java_decoder, twin, request)
    assert np.array_equal(found[chosen], np.fromfile(out, ">f4"))
    assert np.linalg.norm(found[chosen] - found[None]) > 1e-3 * np.linalg.norm(found[None])


def test_what_it_cannot_run_is_one_sentence(
    java_decoder: Callable[..., Any], stories_bundle: Path, tmp_path: Path
) -> None:
    for request, message in (
        ({"context": 4, "prompt": "Once upon a time there was", "stages": [0]}, "the context holds 4"),
        ({"context": 10**6, "prompt": "Once", "stages": [0]}, "is not from 2 to"),
        ({"context": 64, "prompt": "Once", "stages": [7]}, "stage 7 is not one of"),
    ):
        line = json.dumps(GREEDY | {"max_tokens": 4} | request) + "\n"
        done = java_decoder("DecoderCheck", stories_bundle, stdin=line)
        assert (done.returncode, message in done.stderr) == (3, True), done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "stock"), [("fp32", True), ("int4", True), ("int4", False)])
def test_smollm2(
    java_decoder: Callable[..., Any], real_cache: Path, tmp_path: Path, dtype: Any, stock: bool
) -> None:
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    settings = Settings(keep=(0.9, 0.8, 0.7), tokens=4096, boundaries=(8, 16), allocator="spectrum")
    compress("smollm2-135m", tmp_path / "checkpoint", settings)
    bundle = tmp_path / "bundle"
    export(tmp_path / "checkpoint", bundle, dtype=dtype, stock=stock)
    random = np.random.default_rng(0)
    ids = random.integers(3, 49_000, 48).tolist()
    stages = random.integers(0, 3, 48).tolist()
    check_logits(java_decoder, bundle, ids, stages, tmp_path)
    check_answers(java_decoder, bundle, 24)


@pytest.mark.full
def test_three_stages_take_the_memory_of_one(host: Any, real_cache: Path, tmp_path: Path) -> None:
    """Memory of the JVM with SmolLM2 in int4 after an answer through all stages, which all stay open."""
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    memory = []
    for name, keep in (("one", (0.9,)), ("three", (0.9, 0.8, 0.7))):
        settings = Settings(keep=keep, tokens=4096, boundaries=(8, 16)[: len(keep) - 1], allocator="spectrum")
        compress("smollm2-135m", tmp_path / f"{name}-checkpoint", settings)
        export(tmp_path / f"{name}-checkpoint", tmp_path / name, dtype="int4")
    for name in ("one", "three"):
        host.send(type="open", folder=str(tmp_path / name), context=1024, threads=2)
        host.until("opened")
        host.send(type="ask", text="Write a long story about a lighthouse.", max_tokens=48, seed=1)
        events = host.until("done")
        assert len({event["stage"] for event in events[:-1]}) == (1 if name == "one" else 3)
        assert events[-1]["open_stages"] == len({event["stage"] for event in events[:-1]})
        memory.append(host.memory_bytes())
    print(f"bytes: {memory}")
    assert memory[1] <= 1.05 * memory[0], memory


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_golden_bundles(java_decoder: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    check_logits(java_decoder, folder / "bundle", IDS, STAGES, tmp_path)
