"""Write the golden folders of the current schema: ``python -m tests.golden.make``.

They are made once, when a schema version is released, and never again: what an installed flrc-edge wrote then has to be
read by every later one that says it reads that version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import flrc_runtime
from flrc_runtime.manifest import SCHEMA_VERSION

HERE = Path(__file__).parent
STORIES = HERE.parent / "data" / "stories260k"
PROMPT = "Once upon a time"
IDS = np.random.default_rng(0).integers(3, 500, 24).tolist()
STAGES = [i // 3 % 3 for i in range(24)]
# Two kinds of checkpoint and bundle that together have every field: factors as floats, and as integers with pivots.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"storage": "plain"}, {"dtype": "int8"}),
    "pivoted": ({"storage": "pivoted", "dtype": "int4"}, {}),
}


def forced(bundle: Path) -> Any:
    """Return logits [24, vocabulary] of given tokens through given stages."""
    return flrc_runtime.load(bundle, threads=1).logits(IDS, stages=STAGES)


def make(folder: Path) -> None:
    """Compress and export stories260k; without rounding of activations, logits are the same on every machine."""
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings
    from flrc_exporters.bundle import export

    for kind, (settings, options) in KINDS.items():
        checkpoint, bundle = folder / kind / "checkpoint", folder / kind / "bundle"
        chosen = Settings(
            keep=(0.9, 0.8, 0.7), tokens=4096, window=256, rank_step=8, boundaries=(8, 16), **settings
        )
        compress(str(STORIES), checkpoint, chosen)
        export(checkpoint, bundle, accuracy_level=0, **options)
        np.save(folder / kind / "logits.npy", forced(bundle))
        model = flrc_runtime.load(bundle, threads=1)
        answer = flrc_runtime.generate(model, PROMPT, max_tokens=32, chat=False)
        expected = {"prompt": PROMPT, "ids": list(answer.token_ids), "stages": list(answer.stage_of_token)}
        (folder / kind / "answer.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    target = HERE / f"schema_{SCHEMA_VERSION}"
    if target.exists():
        raise SystemExit(f"{target.name} is there, and golden folders are never made again")
    make(target)
