"""``docs/benchmarks.md`` from ``docs/benchmarks.json``, which the measuring commands write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flrc_edge import merged_recipes
from flrc_edge.errors import FormatError
from flrc_edge.evaluation.tables import evaluation_table
from flrc_edge.figures.benchmarks import pictures, write_pictures
from flrc_edge.figures.canvas import MissingPackageError, check_matplotlib
from flrc_runtime.bench import BenchResult
from flrc_runtime.bench.table import as_markdown
from flrc_runtime.files import read_json, write_json
from flrc_runtime.typed_json import build

HEADER = """# Benchmarks

Generated from `benchmarks.json` by the commands named in each section; do not edit. `make benchmarks`,
`benchmarks-summaries`, `benchmarks-healing`, `benchmarks-cost` and `benchmarks-speed` run all with their options.
Weights of the built-in models are dequantized from their published GGUF files ("from Q4_1"), and the baseline is that
dequantized model.
"""
IMAGES = "images"
_log = logging.getLogger(__name__)


def save(path: Path, section: str, key: str, value: Mapping[str, Any]) -> None:
    """Put one result into a JSON file and write the Markdown page beside it anew.

    Recipes are added to those measured under the same conditions, and stand beside those measured under others; any
    other result takes an earlier one's place.

    Args:
        path: The JSON file; created if missing.
        section: A key of ``SECTIONS``.
        key: Of the result inside its section, for instance the model's name.
        value: What was measured.

    Raises:
        FormatError: The file is there and is not a JSON object.
    """
    content: Any = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    results = content.setdefault(section, {})
    if section == "recipes":
        merged_recipes.put(results, key, value)
    else:
        results[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    write_page(path)


def write_page(path: Path) -> None:
    """Write the Markdown page beside a JSON file anew, and its pictures into the folder ``images`` there.

    Without matplotlib the page shows those pictures that are there from before.

    Raises:
        FormatError: The file is not a JSON object, or holds something to draw in another form.
    """
    content: Any = read_json(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    folder = path.parent / IMAGES
    found = [
        p
        for s in SECTIONS
        for key, value in sorted(content.get(s, {}).items())
        for p in pictures(s, key, value)
    ]
    try:
        if found:
            check_matplotlib()
            write_pictures(found, folder)
    except MissingPackageError as error:
        _log.warning("%s: %s", error, error.hint)
    shown = {p.file for p in found if (folder / p.file).exists()}
    path.with_suffix(".md").write_text(page(content, shown=shown), "utf-8")


def page(content: Mapping[str, Mapping[str, Any]], *, shown: Collection[str] | None = None) -> str:
    """Return the whole Markdown page, with the pictures whose file is in ``shown`` (all if None)."""
    parts = [HEADER]
    for section, (title, render) in SECTIONS.items():
        for key, value in sorted(content.get(section, {}).items()):
            parts.append(f"## {title}: {key}\n\n{render(value)}\n")
            parts += [
                f"{picture.markdown(IMAGES)}\n"
                for picture in pictures(section, key, value)
                if shown is None or picture.file in shown
            ]
    return "\n".join(parts)


def recipes_table(c: Mapping[str, Any]) -> str:
    """Return the growth of ln perplexity of every recipe at equal parameters, and what choosing ranks took."""
    names = [t["name"] for t in c["texts"]]
    texts = "; ".join(
        f"{t['name']}, {t['tokens']} tokens, the dense model has {t['dense_perplexity']:.2f}"
        for t in c["texts"]
    )
    lines = [
        "`flrc-edge compare MODEL --save docs/benchmarks.json`",
        "",
        f"Perplexity in windows of {c['window']} tokens ({texts}). Calibrated on {c['calibration_tokens']} tokens of "
        f"{c['calibration']}, "
        f"gradients of labels {'sampled from the model' if c['labels'] == 'sampled' else 'of the text'}. "
        "g = ln perplexity − ln perplexity of the dense model; ÷ is g over that of `svd-llm` (one-sided factors, "
        "the same keep everywhere, plain storage). `keep` is the share of the projections' parameters.",
        "",
        "| keep | recipe | factors | ranks | storage | "
        + "".join(f"{name} | g | ÷ | " for name in names)
        + "stored | dense |",
        "|---|---|---|---|---|" + "---|---|---|" * len(names) + "---|---|",
    ]
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    for f in c["figures"]:
        rows.setdefault((f["keep"], f["recipe"]), {})[f["text"]] = f
    for (keep, recipe), row in rows.items():
        cells = []
        for name in names:
            f = row[name]
            least = min(other[name]["growth"] for (k, _), other in rows.items() if k == keep)
            ratio = "–" if f["ratio"] is None else f"{f['ratio']:.2f}"
            growth = _bold(f"{f['growth']:.3f}", f["growth"] == least)
            cells.append(f"{f['perplexity']:.2f} | {growth} | {ratio}")
        lines.append(
            f"| {keep:g} | {recipe} | {f['factorization']} | {f['ranks']} | {f['storage']} | {' | '.join(cells)} "
            f"| {f['kept']:.4f} | {f['dense_projections']} |"
        )
    lines += _rank_search(c["searches"])
    phases = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in c["seconds"].items())
    lines += ["", f"Wall time: {phases}. Peak memory {c['peak_rss_bytes'] / 2**30:.1f} GiB. {c['machine']}."]
    return "\n".join(lines)


def _rank_search(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of what choosing the ranks of one keep took, the first row being the yardstick."""
    if not searches:
        return []
    first = searches[0]["seconds"]
    lines = [
        "",
        f"Rank search, wall time for one keep. ASVD's samples hold {searches[0]['tokens']} tokens; published are 32 "
        "of 2048 tokens, and its time grows with them.",
        "",
        "| search | counted | tokens | seconds | asvd ÷ this |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['search']} | {s['counted']} | {s['tokens'] or '–'} | {s['seconds']:.4g} "
        f"| {first / max(s['seconds'], 1e-4):.3g} |"
        for s in searches
    ]
    return lines


def formats_table(c: Mapping[str, Any]) -> str:
    """Return what rounding to int8 and int4 costs."""
    lines = [
        "`flrc-edge compare MODEL --formats --save docs/benchmarks.json`",
        "",
        f"The dense model exported in each number format (symmetric; a scale in 32 inputs, or as many as the format "
        f"says, fewer where a row would be padded), rounded to nearest or with compensation (`compress --dtype`), "
        f"{c['tokens']} tokens of {c['text']} through onnxruntime {c['onnxruntime']}. KL is to the fp32 export.",
        "",
        "| format | head | rounded | weights MB | perplexity | mean KL (nats) | same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['dtype']} | {f['head']} | {'with compensation' if f.get('compensated') else 'to nearest'} "
        f"| {f['weight_bytes'] / 1e6:.1f} | {f['perplexity']:.2f} "
        f"| {abs(f['mean_kl']):.4f} | {100 * f['top1']:.1f} % |"
        for f in c["formats"]
    ]
    return "\n".join(lines)


def cost_table(c: Mapping[str, Any]) -> str:
    """Return what compressing takes, as measured and as estimated."""
    lines = [
        "`flrc-edge estimate MODEL --check N,N,… --save docs/benchmarks.json`",
        "",
        f"`flrc-edge compress` at keep {c['keep']:g} (plain factors in floats, the default allocator, windows of "
        f"{c['window']} tokens), each in a process and with a cache of its own, beside what `flrc-edge estimate` says "
        "of it. Measuring every rank takes 8 windows, or all there are.",
        "",
        "| model | M parameters | tokens | calibrate s | factorize s | measure s | all s | estimated s | peak GB | "
        "estimated GB | ÷ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in c["points"]:
        seconds, peak, expected = p["seconds"], p["peak_bytes"], p["expected_bytes"]
        phases = " | ".join(f"{seconds.get(name, 0.0):.0f}" for name in ("calibrate", "factorize", "measure"))
        lines.append(
            f"| {p['model']} | {p['parameters'] / 1e6:.0f} | {p['tokens']} | {phases} | {sum(seconds.values()):.0f} "
            f"| {p['expected_seconds']:.0f} | {peak / 1e9:.2f} | {expected / 1e9:.2f} | {expected / peak:.2f} |"
        )
    return "\n".join([*lines, "", f"{c['machine']}."])


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
        f"Phases: {phases}. {c['machine']}; decode: batch 1, behind 64 tokens, in turn, medians.",
        "",
        f"*{c['prompt']}* Dense:\n\n{quoted_dense}\n\nThrough the stages:\n\n{quoted}",
    ]
    return "\n".join(lines)


def frontier_table(c: Mapping[str, Any]) -> str:
    """Return quality against bytes, the smallest file last."""
    names = [t["name"] for t in c["texts"]]
    texts = "; ".join(
        f"{t['name']}, {t['tokens']} tokens, the dense model has {t['dense_perplexity']:.2f}"
        for t in c["texts"]
    )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for p in c["points"]:
        rows.setdefault((p["series"], p["label"]), {})[p["text"]] = p
    lines = [
        "`flrc-edge compare MODEL --frontier --save docs/benchmarks.json`",
        "",
        f"Bytes of the exported weight file, everything in it counted, and bits: those bytes over the model's "
        f"{c['parameters'] / 1e6:.1f} M parameters. Perplexity in windows of {c['window']} tokens ({texts}), of the "
        f"integers' values in torch. Calibrated on {c['calibration_tokens']} tokens of {c['calibration']}. g = ln "
        "perplexity − ln perplexity of the dense model in floats. Embedding and head are int8, but for `mixed`, where "
        f"the plan chooses. Factors of ours may be stored {'plain only' if c['storage'] == 'plain' else 'either way'}"
        ". **Bold**: no smaller file has less g.",
        "",
        "| MB | bits | what | | keep | " + "".join(f"{name} | g | " for name in names).rstrip(),
        "|---|---|---|---|---|" + "---|---|" * len(names),
    ]
    ordered = sorted(rows.items(), key=lambda item: -item[1][names[0]]["bytes"])
    for (series, label), row in ordered:
        first = row[names[0]]
        cells = []
        for name in names:
            best = min(r[name]["growth"] for r in rows.values() if r[name]["bytes"] <= first["bytes"])
            growth = _bold(f"{row[name]['growth']:.3f}", row[name]["growth"] == best)
            cells.append(f"{row[name]['perplexity']:.2f} | {growth}")
        lines.append(
            f"| {first['bytes'] / 1e6:.1f} | {first['bits']:.2f} | {series} | {label} | {first['kept']:.3f} "
            f"| {' | '.join(cells)} |"
        )
    phases = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in c["seconds"].items())
    lines += ["", f"Wall time: {phases}. Peak memory {c['peak_rss_bytes'] / 2**30:.1f} GiB. {c['machine']}."]
    return "\n".join(lines)


def joint_table(c: Mapping[str, Any]) -> str:
    """Return what joint factors are predicted to gain."""
    lines = [
        "`flrc-edge compare MODEL --joint --save docs/benchmarks.json`",
        "",
        f"One V for the projections that read the same inputs (q-k-v, gate-up: {c['groups']} groups), two-sided, "
        "against one V each: growth of the token loss (nats) as the spectra predict it after "
        f"{c['calibration_tokens']} calibration tokens, at the same parameters, every projection or group "
        f"dense where that is better. `chosen`: groups where joint factors win. {c['machine']}.",
        "",
        "| storage | keep | separate | joint where better | gain | chosen |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['storage']} | {f['keep']:g} | {f['separate']:.4f} | {f['joint']:.4f} "
        f"| {100 * (1 - f['joint'] / f['separate']) if f['separate'] else 0:.1f} % | {f['chosen']} |"
        for f in c["figures"]
    ]
    return "\n".join(lines)


def healing_table(c: Mapping[str, Any]) -> str:
    """Return the curve of one healing run."""
    stages = range(len(c["curve"][0]["validation"]))
    texts = " + ".join(f"{t['name']} ({t['weight']:g})" for t in c["texts"])
    settings = c["settings"]
    lines = [
        "`flrc-edge heal CHECKPOINT -o OUTPUT --save docs/benchmarks.json`",
        "",
        f"Distillation of {c['checkpoint']} (keep {', '.join(f'{k:.3f}' for k in c['kept'])}, {c['storage']}) from "
        f"{c['model']} on {c['tokens']} tokens of {texts}: {settings['train']}, lr {settings['lr']:g}, "
        f"{settings['tokens_per_step']} tokens a step, {c['precision']}. Mean KL to the dense model, nats a token, on "
        f"windows of the same texts that are not trained on. {c['machine']}.",
        "",
        "| step | minutes | " + " | ".join(f"stage {s}" for s in stages) + " |",
        "|---|---|" + "---|" * len(stages),
    ]
    points = c["curve"]
    every = max(1, len(points) // 12)
    shown = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    lines += [
        f"| {p['step']} | {p['minutes']:.1f} | " + " | ".join(f"{v:.4f}" for v in p["validation"]) + " |"
        for p in shown
    ]
    return "\n".join(lines)


def speed_table(c: Mapping[str, Any]) -> str:
    """Return what ``flrc-edge bench`` printed."""
    result = build(BenchResult, json.loads(json.dumps(c)), "speed")  # one just measured has tuples
    return f"`flrc-edge bench BUNDLE… --save docs/benchmarks.json`\n\n{as_markdown(result)}"


def accelerator_table(c: Mapping[str, Any]) -> str:
    """Return where the nodes of a bundle run on an accelerator, and how far its logits are from the CPU's."""
    soc = c["options"].get("soc")
    option = f"qnn --soc {soc} --precision {c['options']['precision']}" if soc else c["provider"]
    lines = [
        f"`flrc-edge place BUNDLE --provider {option} --tokens {c['tokens']} --save docs/benchmarks.json`",
        "",
        f"{c['dtype']} weights, a window of {c['window']} positions; {c['tokens']} given tokens through "
        f"{len(set(c['stages']))} stages: relative L2 {c['relative_l2']:.2g} from the CPU, same best token "
        f"{c['top1']:.0%}.",
        "",
        "| graph | nodes | on the accelerator | elsewhere | binary alone, MB |",
        "|---|---|---|---|---|",
    ]
    for g in c["graphs"]:
        rest = ", ".join(sorted(set(g["elsewhere"]))) or "none"
        size = f"{g['binary_bytes'] / 1e6:.1f}" if g["binary_bytes"] else ""
        lines.append(f"| {g['name']} | {g['nodes']} | {g['placed']} | {rest} | {size} |")
    shared = (
        f"All binaries with one copy of the weights: {c['shared_bytes'] / 1e6:.1f} MB. "
        if c["shared_bytes"]
        else ""
    )
    return "\n".join([*lines, "", f"{shared}{c['ms_per_token']:.0f} ms a token here; {c['conditions']}."])


SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "recipes": ("Recipes at equal parameters", recipes_table),
    "frontier": ("Quality against bytes", frontier_table),
    "joint": ("Joint factors", joint_table),
    "healing": ("Healing", healing_table),
    "speed": ("Speed", speed_table),
    "accelerators": ("Accelerators", accelerator_table),
    "formats": ("Number formats", formats_table),
    "cost": ("What compressing takes", cost_table),
    "demo": ("The demo", demo_table),
    "evaluation": ("Evaluation", evaluation_table),
}


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text
