"""The Java engine decodes a bundle as the Python runtime does: logits, tokens, text, across moves between stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import flrc_runtime
from flrc_exporters.bundle import export
from flrc_runtime import Sampling, ScriptedStages

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
CASES: list[tuple[dict[str, Any], list[int]]] = [
    (GREEDY, []),  # the bundle's schedule
    (GREEDY, [0, 1, 2, 2, 1, 0]),
    (GREEDY | {"repetition_penalty": 1.3}, [0, 0, 1, 1, 2]),
    (GREEDY | {"temperature": 0.8, "seed": 7}, [0]),
    (GREEDY | {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 12_345_678_901}, [0, 1, 2]),
    (GREEDY | {"temperature": 1.5, "top_k": 5, "seed": 3}, [2]),
    (GREEDY | {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "seed": 2**62}, [1]),
]
PROMPTS = ("Once upon a time", "The little dog saw a bird and")


def ask(java: Callable[..., Any], bundle: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    done = java("DecoderCheck", bundle, stdin="".join(json.dumps(r) + "\n" for r in requests))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def forced(
    java: Callable[..., Any], bundle: Path, ids: list[int], stages: list[int], scratch: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the logits of the Java engine and of the Python runtime, token by token through the same stages."""
    out = scratch / "logits.bin"
    ask(java, bundle, {"context": len(ids) + 1, "feed": ids, "stages": stages, "out": str(out)})
    found = np.fromfile(out, ">f4").astype(np.float32).reshape(len(ids), -1)
    decoder = flrc_runtime.load(bundle, threads=1, context=len(ids) + 1).decoder()
    wanted = np.stack([decoder.step(i, s).copy() for i, s in zip(ids, stages, strict=True)])
    return found, wanted


def check_answers(java: Callable[..., Any], bundle: Path, tokens: int) -> None:
    asked = [
        {"context": 256, "prompt": prompt, "stages": stages, "max_tokens": tokens, **sampling}
        for prompt in PROMPTS
        for sampling, stages in CASES
    ]
    model = flrc_runtime.load(bundle, context=256, threads=1)
    for request, answer in zip(asked, ask(java, bundle, *asked), strict=True):
        stages: Any = request["stages"]
        wanted = flrc_runtime.generate(
            model,
            str(request["prompt"]),
            max_tokens=tokens,
            chat=False,
            sampling=Sampling(**{name: request[name] for name in GREEDY}),  # type: ignore[arg-type]
            policy=ScriptedStages(tuple(stages)) if stages else None,
        )
        assert answer["ids"] == list(wanted.token_ids), request
        assert answer["stages"] == list(wanted.stage_of_token)
        assert (answer["text"], answer["reason"]) == (wanted.text, wanted.finish_reason)


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_logits_and_answers_of_stories(
    java_decoder: Callable[..., Any], compressed_stories: Any, tmp_path: Path, dtype: Any
) -> None:
    bundle = tmp_path / "bundle"
    export(compressed_stories.checkpoint, bundle, dtype=dtype)
    random = np.random.default_rng(0)
    ids = random.integers(3, 500, 96).tolist()
    stages = random.integers(0, 3, 96).tolist()
    found, wanted = forced(java_decoder, bundle, ids, stages, tmp_path)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    check_answers(java_decoder, bundle, 60)


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
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_smollm2(java_decoder: Callable[..., Any], real_cache: Path, tmp_path: Path, dtype: Any) -> None:
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    settings = Settings(keep=(0.9, 0.8, 0.7), tokens=4096, boundaries=(8, 16), allocator="spectrum")
    compress("smollm2-135m", tmp_path / "checkpoint", settings)
    bundle = tmp_path / "bundle"
    export(tmp_path / "checkpoint", bundle, dtype=dtype)
    random = np.random.default_rng(0)
    ids = random.integers(3, 49_000, 48).tolist()
    stages = random.integers(0, 3, 48).tolist()
    found, wanted = forced(java_decoder, bundle, ids, stages, tmp_path)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    check_answers(java_decoder, bundle, 24)


@pytest.mark.full
def test_three_stages_take_the_memory_of_one(host: Any, real_cache: Path, tmp_path: Path) -> None:
    """Peak resident memory of the JVM with SmolLM2 in int4, one stage resident, after an answer through all stages."""
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    peaks = []
    for name, keep in (("one", (0.9,)), ("three", (0.9, 0.8, 0.7))):
        settings = Settings(keep=keep, tokens=4096, boundaries=(8, 16)[: len(keep) - 1], allocator="spectrum")
        compress("smollm2-135m", tmp_path / f"{name}-checkpoint", settings)
        export(tmp_path / f"{name}-checkpoint", tmp_path / name, dtype="int4")
    for name in ("one", "three"):
        host.send(type="open", folder=str(tmp_path / name), context=1024, threads=2)
        host.until("opened")
        host.reset_peak()
        host.send(type="ask", text="Write a long story about a lighthouse.", max_tokens=48, seed=1)
        events = host.until("done")
        assert len({event["stage"] for event in events[:-1]}) == (1 if name == "one" else 3)
        peaks.append(host.peak_bytes())
    print(f"peak resident bytes: {peaks}")
    assert peaks[1] <= 1.3 * peaks[0], peaks
