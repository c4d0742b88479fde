"""What a decode step spends its time on, by kind of operator, as onnxruntime's own profiler tells it."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import open_bundle
from ..decoder import Decoder
from ..errors import FlrcError
from ..providers import CPU
from ..sessions import StageSessions
from .result import Operators

WARM = 4  # steps before those that count
STEPS = 32
_KERNEL = "_kernel_time"


def profile(folder: Path, stage: int, ids: Sequence[int], *, threads: int | None) -> list[Operators]:
    """Decode with one stage of a bundle under the profiler.

    Args:
        folder: The bundle.
        stage: Of it.
        ids: The prompt.
        threads: Of one operator; None for onnxruntime's choice.

    Returns:
        One row a kind of operator, the one that takes most first.

    Raises:
        FlrcError: onnxruntime wrote no trace.
    """
    bundle = open_bundle(folder)
    with tempfile.TemporaryDirectory() as scratch:
        sessions = StageSessions(
            bundle.folder,
            bundle.manifest,
            threads=threads,
            providers=(CPU,),
            trace=Path(scratch) / "trace",
        )
        context = len(ids) + WARM + STEPS + 1
        decoder = Decoder(sessions, context=context, vocab_size=bundle.manifest.model.vocab_size)
        try:
            logits = decoder.prefill(ids, stage)
            for _ in range(WARM + STEPS):
                logits = decoder.step(int(logits.argmax()), stage)
        finally:
            decoder.close()
        path = Path(sessions.get(stage).end_profiling())
        try:
            events = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FlrcError(f"onnxruntime wrote no trace that can be read: {error}") from None
    return [
        Operators(folder.resolve().name, str(stage), kind, count / STEPS, microseconds / STEPS / 1e3)
        for kind, (count, microseconds) in _summed(events).items()
    ]


def _summed(events: Sequence[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Return number and microseconds of every kind of operator in the last steps, the one that takes most first."""
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    since = runs[-STEPS]
    found: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and event["ts"] >= since:
            kind = event["args"]["op_name"]
            count, spent = found[kind]
            found[kind] = (count + 1, spent + event["dur"])
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
