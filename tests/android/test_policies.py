"""The Java policies choose the stages that the Python runtime's choose, on the same numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from flrc_runtime import Cheapest, LatencyBudget, MeanBudget, SignalStages, StepState

KEPT = [0.95, 0.9, 0.7, 0.4]
POLICIES: dict[str, list[dict[str, Any]]] = {
    "latency": [{"kind": "latency", "ms": 10.0, "stages": 4}],
    "mean": [{"kind": "mean", "mean": 0.8, "kept": KEPT}],
    "tight mean": [{"kind": "mean", "mean": 0.5, "kept": KEPT}],
    "signal": [{"kind": "signal", "hysteresis": 0.0, "thresholds": [0.5, 0.3, 0.1]}],
    "hysteresis": [{"kind": "signal", "hysteresis": 0.1, "thresholds": [0.5, 0.3, 0.1]}],
    "both": [
        {"kind": "latency", "ms": 12.0, "stages": 4},
        {"kind": "signal", "hysteresis": 0.05, "thresholds": [0.6, 0.2]},
        {"kind": "mean", "mean": 0.9, "kept": KEPT},
    ],
}


def steps(seed: int) -> list[tuple[int, float, float | None]]:
    """Three answers: tokens so far, milliseconds of the last step, and a signal that wanders."""
    rng = random.Random(seed)
    level, found = 0.7, []
    for _ in range(3):
        for generated in range(1, 120):
            level = min(1.0, max(0.0, level + rng.uniform(-0.06, 0.055)))
            known = None if rng.random() < 0.05 else level
            found.append((generated, 0.0 if generated == 1 else rng.uniform(6, 16), known))
    return found


def python_stages(policies: list[dict[str, Any]], asked: list[tuple[int, float, float | None]]) -> list[int]:
    signal = [math.nan]
    made: list[Any] = []
    for p in policies:
        if p["kind"] == "latency":
            made.append(LatencyBudget(p["ms"], p["stages"]))
        elif p["kind"] == "mean":
            made.append(MeanBudget(p["mean"], p["kept"]))
        else:
            made.append(SignalStages(lambda: signal[0], p["thresholds"], hysteresis=p["hysteresis"]))
    policy = made[0] if len(made) == 1 else Cheapest(*made)
    stage, stages = 0, []
    for generated, ms, level in asked:
        signal[0] = math.nan if level is None else level
        stage = policy(StepState(generated, generated, ms, stage))
        stages.append(stage)
    return stages


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_stages(java: Callable[..., Any], name: str) -> None:
    requests = [{"policies": POLICIES[name], "steps": steps(seed)} for seed in range(5)]
    done = java("PolicyCheck", stdin="".join(json.dumps(request) + "\n" for request in requests))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [python_stages(POLICIES[name], steps(seed)) for seed in range(5)]
    assert len({stage for one in found for stage in one}) > 1, "the numbers must make it move"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "latency", "ms": 0.0, "stages": 2}, "is not positive"),
        ({"kind": "mean", "mean": 0.1, "kept": [0.9, 0.5]}, "below the share of the last stage"),
        ({"kind": "mean", "mean": 0.9, "kept": [0.5, 0.9]}, "must not grow"),
        ({"kind": "signal", "hysteresis": 0.0, "thresholds": [0.1, 0.5]}, "must fall"),
        ({"kind": "signal", "hysteresis": -1.0, "thresholds": [0.5]}, "is negative"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    java: Callable[..., Any], policy: dict[str, Any], message: str
) -> None:
    done = java("PolicyCheck", stdin=json.dumps({"policies": [policy], "steps": []}) + "\n")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
