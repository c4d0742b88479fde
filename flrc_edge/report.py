"""``docs/benchmarks.md`` from ``docs/benchmarks.json``, which the measuring commands write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flrc_edge.errors import FormatError
from flrc_runtime.files import read_json, write_json

HEADER = """# Benchmarks

Generated from `benchmarks.json` by the commands named in each section; do not edit. Weights of the built-in models
are dequantized from their published GGUF files ("from Q4_1"), and the baseline is that dequantized model.
"""


def save(path: Path, section: str, key: str, value: Mapping[str, Any]) -> None:
    """Put one result into a JSON file and write the Markdown page beside it anew.

    Args:
        path: The JSON file; created if missing.
        section: ``allocators``, ``formats`` or ``demo``.
        key: Of the result inside its section, for instance the model's name.
        value: What was measured.

    Raises:
        FormatError: The file is there and is not a JSON object.
    """
    content: Any = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    content.setdefault(section, {})[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    path.with_suffix(".md").write_text(page(content), "utf-8")


def page(content: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the whole Markdown page."""
    parts = [HEADER]
    for section, (title, render) in SECTIONS.items():
        for key, value in sorted(content.get(section, {}).items()):
            parts.append(f"## {title}: {key}\n\n{render(value)}\n")
    return "\n".join(parts)


def allocators_table(c: Mapping[str, Any]) -> str:
    """Return the perplexities of allocators at equal parameters."""
    figures = c["figures"]
    names = list(dict.fromkeys(f["allocator"] for f in figures))
    lines = [
        "`flrc-edge compare MODEL --calibration TEXT --no-cache --save docs/benchmarks.json` (`make benchmarks`)",
        "",
        f"Perplexity on {c['text']}, {c['evaluation_tokens']} tokens in windows of {c['window']}; calibrated on "
        f"{c['calibration']} tokens; the dense model has {c['dense_perplexity']:.2f}. One-sided with `uniform` is "
        "SVD-LLM's setting. `keep` is the share of the projections' parameters.",
        "",
        f"| keep | factors | {' | '.join(names)} | stored |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for keep, method in dict.fromkeys((f["keep"], f["factorization"]) for f in figures):
        row = {f["allocator"]: f for f in figures if (f["keep"], f["factorization"]) == (keep, method)}
        best = min(f["perplexity"] for f in row.values())
        cells = [_bold(f"{row[n]['perplexity']:.2f}", row[n]["perplexity"] == best) for n in names]
        stored = sorted({f"{f['kept']:.4f}" for f in row.values()})
        lines.append(f"| {keep:g} | {method} | {' | '.join(cells)} | {' … '.join(stored)} |")
    phases = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in c["seconds"].items())
    lines += ["", f"Wall time: {phases}. Peak memory {c['peak_rss_bytes'] / 2**30:.1f} GiB. {c['machine']}."]
    return "\n".join(lines)


def formats_table(c: Mapping[str, Any]) -> str:
    """Return what rounding to int8 and int4 costs."""
    lines = [
        "`flrc-edge compare MODEL --formats --save docs/benchmarks.json`",
        "",
        f"The dense model exported in each number format (symmetric, blocks of 32, rounded to nearest), "
        f"{c['tokens']} tokens of {c['text']} through onnxruntime {c['onnxruntime']}. KL is to the fp32 export.",
        "",
        "| format | head | weights MB | perplexity | mean KL (nats) | same top token |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['dtype']} | {f['head']} | {f['weight_bytes'] / 1e6:.1f} | {f['perplexity']:.2f} "
        f"| {abs(f['mean_kl']):.4f} | {100 * f['top1']:.1f} % |"
        for f in c["formats"]
    ]
    return "\n".join(lines)


def demo_table(c: Mapping[str, Any]) -> str:
    """Return the figures of ``flrc-edge demo``."""
    dense = c["dense"]
    lines = [
        "`flrc-edge demo --save docs/benchmarks.json`",
        "",
        f"Everything {c['dtype']}, rounded to nearest; perplexity on held-out text (half WikiText-2, half Austen); "
        f"decode time beside the dense export in the same run. Bundle {c['bundle_bytes'] / 1e6:.1f} MB.",
        "",
        "| | keep | perplexity | ms/token | ÷ dense | MB read a token |",
        "|---|---|---|---|---|---|",
        f"| dense | 1 | {dense['ppl']:.2f} | {dense['ms_per_token']:.2f} | 1 | {dense['bytes'] / 1e6:.1f} |",
    ]
    lines += [
        f"| stage {i} | {s['keep']:.3f} | {s['ppl']:.2f} | {s['ms_per_token']:.2f} "
        f"| {s['ms_per_token'] / dense['ms_per_token']:.2f} | {s['bytes'] / 1e6:.1f} |"
        for i, s in enumerate(c["stages"])
    ]
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in c["seconds"].items())
    quoted = "\n".join(f"> {line}" for line in c["answer"].splitlines())
    quoted_dense = "\n".join(f"> {line}" for line in c["dense_answer"].splitlines())
    lines += [
        "",
        f"Phases: {phases}. {c['machine']}; decode: batch 1, 64 tokens behind a prompt of 64, median of 5.",
        "",
        f"*{c['prompt']}* Dense:\n\n{quoted_dense}\n\nThrough the stages:\n\n{quoted}",
    ]
    return "\n".join(lines)


SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "allocators": ("Allocators at equal parameters", allocators_table),
    "formats": ("Number formats", formats_table),
    "demo": ("The demo", demo_table),
}


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text
