"""A :class:`~flrc_runtime.bench.BenchResult` as a markdown table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from .bench import BenchResult, Row, move_ms


def as_json(result: BenchResult) -> str:
    """Return all fields as JSON."""
    return json.dumps(asdict(result), indent=1)


def as_csv(result: BenchResult) -> str:
    """Return the rows with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.rows)
    return text.getvalue().rstrip("\n")


def as_markdown(result: BenchResult) -> str:
    """Return a table in the shape of llama-bench's, and a line about loading each bundle."""
    compared = any(row.ratio is not None for row in result.rows)
    header = [
        "bundle",
        "stage",
        "keep",
        "test",
        "ms/token",
        "spread",
        "tok/s",
        *(["ratio"] if compared else []),
    ]
    lines = [header, ["---"] * 3 + ["---"] + ["---:"] * (len(header) - 4)]
    for row in result.rows:
        lines.append(
            [
                row.bundle,
                row.stage,
                "" if row.keep is None else f"{row.keep:.2f}",
                f"{row.test} {row.tokens}",
                f"{row.ms_per_token:.2f}",
                f"{row.ms_spread:.2f}",
                f"{row.tokens_per_second:.1f}",
                *([f"{row.ratio:.2f}"] if row.ratio is not None else []),
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    loading = "\n".join(
        f"{load.bundle}: {load.file_bytes / 1e6:.1f} MB of files, loaded in {load.seconds:.2f} s"
        + (f", {load.resident_bytes / 1e6:.0f} MB resident" if load.resident_bytes is not None else "")
        for load in result.loading
    )
    for bundle in dict.fromkeys(row.bundle for row in result.rows):
        cost = move_ms(result, bundle)
        if cost is not None:
            loading += f"\n{bundle}: moving to another stage costs {cost:.2f} ms more than staying"
    threads = "onnxruntime's choice of" if result.threads is None else result.threads
    conditions = (
        f"{result.machine}, onnxruntime {result.onnxruntime}, {threads} threads, "
        f"median of {result.repetitions}, batch 1"
    )
    return f"{table}\n\n{loading}\n{conditions}"
