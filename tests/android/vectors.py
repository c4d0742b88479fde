"""What the Java engine has to compute: logits through given stages, and answers, beside the Python runtime's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flrc_runtime
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


def ask(
    java: Callable[..., Any], bundle: Path, *requests: dict[str, Any], level: int | None = None
) -> list[dict[str, Any]]:
    levels = [] if level is None else [level]
    done = java("DecoderCheck", bundle, *levels, stdin="".join(json.dumps(r) + "\n" for r in requests))
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


def check_logits(
    java: Callable[..., Any], bundle: Path, ids: list[int], stages: list[int], scratch: Path
) -> None:
    """Compare the logits of both: our own operators give the same bytes, onnxruntime's nearly."""
    found, wanted = forced(java, bundle, ids, stages, scratch)
    if flrc_runtime.load(bundle).manifest.operators:
        assert found.tobytes() == wanted.tobytes()
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


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
