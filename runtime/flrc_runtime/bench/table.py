"""A :class:`~flrc_runtime.bench.BenchResult` as markdown tables, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from .result import BenchResult, Beside, Loading, Operators, Row


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
    """Return the speeds, what else was measured, and the conditions."""
    parts = [_speeds(result.rows, result.product_bandwidth)]
    if result.beside:
        parts.append(_beside(result.beside))
    if result.loading:
        parts.append(_loading(result.loading))
    if result.operators:
        parts.append(_operators(result.operators))
    notes = [
        f"{move.bundle}: moving to another stage costs {move.ms:.2f} ms more than staying"
        f"{_interval(move.low, move.high, ' (95 % interval {})')}"
        for move in result.moves
    ]
    threads = "the default" if result.threads is None else result.threads
    versions = dict.fromkeys(
        f"{name} {version}" if name == "onnxruntime" else version for name, version in result.versions.items()
    )
    if any(row.ratio is not None for row in result.rows):
        notes.append(
            "Steps and prompts of all rows in turn; the ratio is the median of the times over those of the first row "
            "of the test in the same turn, with its 95 % interval; what has no steps (llama.cpp, drafts) makes "
            f"{result.decode_tokens} tokens at a stretch, in turn with the first row."
        )
    product, isa = result.product_bandwidth, result.isa
    streams = "" if product is None else f", one large product of ours {product / 1e9:.1f}"
    conditions = [
        result.machine,
        *([] if isa is None else [f"operators {isa}"]),
        *versions,
        f"{threads} threads, {result.repetitions} repetitions, batch 1",
    ]
    notes.append(
        f"{', '.join(conditions)}; this machine's memory reads {result.bandwidth / 1e9:.1f} GB/s{streams}"
    )
    return "\n\n".join([*parts, "\n".join(notes)])


def _speeds(rows: Sequence[Row], product: float | None) -> str:
    optional = {
        "MB/token": [_mega(row.bytes_per_token, ".1f") for row in rows],
        "GB/s": [_text(row.gb_per_second, ".1f") for row in rows],
        "of a product": [
            _text(
                None if not product or row.gb_per_second is None else row.gb_per_second * 1e9 / product, ".2f"
            )
            for row in rows
        ],
        "accepted": [_text(row.accepted, ".2f") for row in rows],
        "ratio": [_text(row.ratio, ".3f") for row in rows],
        "95 %": [_interval(row.ratio_low, row.ratio_high) for row in rows],
    }
    shown = {name: cells for name, cells in optional.items() if any(cells)}
    header = ["bundle", "stage", "keep", "test", "ms/token", "spread", "tok/s", *shown]
    body = [
        [
            row.bundle,
            row.stage,
            _text(row.keep, ".2f"),
            f"{row.test} {row.tokens}" if row.test == "prompt" else f"{row.test} behind {row.tokens}",
            f"{row.ms_per_token:.2f}",
            f"{row.ms_spread:.2f}",
            f"{row.tokens_per_second:.1f}",
            *(cells[i] for cells in shown.values()),
        ]
        for i, row in enumerate(rows)
    ]
    return _table(header, body, words=4)


def _beside(found: Sequence[Beside]) -> str:
    header = ["bundle", "stage", "busy processes", "ms/token alone", "beside them", "ratio", "95 %"]
    body = [
        [
            row.bundle,
            row.stage,
            str(row.processes),
            f"{row.ms_alone:.2f}",
            f"{row.ms_per_token:.2f}",
            f"{row.ratio:.2f}",
            _interval(row.ratio_low, row.ratio_high),
        ]
        for row in found
    ]
    return _table(header, body, words=2)


def _loading(loading: Sequence[Loading]) -> str:
    header = [
        "bundle",
        "stages",
        "first token s",
        "cold",
        "opening",
        "sessions",
        "loaded MB",
        "used",
        "private",
        "process",
        "keys and values",
        "files",
    ]
    body = [
        [
            row.bundle,
            str(row.stages),
            f"{row.first_token_seconds:.2f}",
            _text(row.cold_seconds, ".2f"),
            f"{row.open_seconds:.3f}",
            f"{row.session_seconds:.3f}",
            *(
                _mega(value, ".0f")
                for value in (row.loaded_bytes, row.used_bytes, row.private_bytes, row.process_bytes)
            ),
            _mega(row.cache_bytes, ".1f"),
            _mega(row.file_bytes, ".0f"),
        ]
        for row in loading
    ]
    return _table(header, body, words=1)


def _operators(operators: Sequence[Operators]) -> str:
    """Return a row for every kind of operator that takes a hundredth of its step, and one for the others."""
    header = ["bundle", "stage", "operator", "a step", "µs each", "ms/token", "share"]
    body: list[list[str]] = []
    for bundle, stage in dict.fromkeys((o.bundle, o.stage) for o in operators):
        own = [o for o in operators if (o.bundle, o.stage) == (bundle, stage)]
        total = sum(o.ms_per_token for o in own)
        small = [o for o in own if o.ms_per_token < 0.01 * total]
        kinds = [(o.kind, o.count, o.ms_per_token) for o in own if o not in small]
        if small:
            kinds.append(("others", sum(o.count for o in small), sum(o.ms_per_token for o in small)))
        kinds.append(("all", sum(o.count for o in own), total))
        body += [
            [bundle, stage, kind, f"{n:.0f}", f"{ms / n * 1e3:.1f}", f"{ms:.2f}", f"{ms / total:.2f}"]
            for kind, n, ms in kinds
        ]
    return _table(header, body, words=3)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mega(value: int | None, form: str) -> str:
    return "" if value is None else format(value / 1e6, form)


def _interval(low: float | None, high: float | None, form: str = "{}") -> str:
    return "" if low is None or high is None else form.format(f"{low:.3f} to {high:.3f}")


def _table(header: Sequence[str], body: Sequence[Sequence[str]], *, words: int) -> str:
    """Return a markdown table whose first columns are words and whose others are numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
