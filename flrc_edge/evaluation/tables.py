"""An evaluation as Markdown tables, from the plain values of ``Evaluation.as_dict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Value = Mapping[str, Any]


def evaluation_table(c: Value) -> str:
    """Return every table of an evaluation, each with its conditions."""
    stages = ", ".join(f"{k:.3f}" for k in c["kept"])
    moves = f", moving on at answer tokens {', '.join(map(str, c['boundaries']))}" if c["boundaries"] else ""
    parts = [
        "`flrc-edge eval`",
        f"{c['kind'].capitalize()} of {c['model']}, {c['dtype']}; stages keep {stages} of "
        f"{c['projection_parameters'] / 1e6:.4g} M projection parameters{moves}. "
        + (f"Dense reference: {c['dense']}. " if c["dense"] else "No dense reference. ")
        + f"In brackets 95 % bootstrap intervals ({c['resamples']} resamples, seed {c['seed']}). {c['machine']}.",
    ]
    parts += [_text(t) for t in c["texts"]]
    parts += [_summaries(s) for s in c["summaries"]]
    return "\n\n".join(parts)


def _text(t: Value) -> str:
    columns = {
        "perplexity": ("perplexity", _number),
        "bits/byte": ("bits_per_byte", _number),
        "KL (nats)": ("kl", _number),
        "KL p99": ("kl_p99", _number),
        "same top token": ("top1", _percent),
    }
    rows = [
        [f["stage"], f"{f['keep']:.4g}", *(show(f["estimates"].get(key)) for key, show in columns.values())]
        for f in t["figures"]
    ]
    bos = ", each with BOS" if t["bos"] else ""
    return (
        f"**{t['text']}**: {t['tokens']} tokens ({t['bytes']} bytes) of {t['windows']} windows of {t['window']}, "
        f"stride {t['stride']}{bos}\n\n" + _table(["", "keep", *columns], rows)
    )


def _summaries(s: Value) -> str:
    columns = {
        "keep, prompt": ("prompt_keep", _number),
        "keep, answer": ("answer_keep", _number),
        "tokens": ("tokens", _number),
        "R-1": ("rouge1", _percent),
        "R-2": ("rouge2", _percent),
        "R-L": ("rougeL", _percent),
        "R-L to dense": ("rougeL_dense", _percent),
        "KL (nats)": ("kl", _number),
        "KL p99": ("kl_p99", _number),
        "same top token": ("top1", _percent),
        "repetition": ("repetition", _percent),
        "BERTScore": ("bertscore", _percent),
        "BERTScore to dense": ("bertscore_dense", _percent),
    }
    measured = {key for p in s["policies"] for key in p["estimates"]}
    columns = {title: column for title, column in columns.items() if column[0] in measured}
    rows = [
        [p["policy"], *(show(p["estimates"].get(key)) for key, show in columns.values())]
        for p in s["policies"]
    ]
    left_out = f" ({s['too_long']} too long for the context were passed over)" if s["too_long"] else ""
    encoder = (
        f"BERTScore with {s['bertscore']}" if s["bertscore"] else "BERTScore not measured (no encoder given)"
    )
    parts = [
        f"**{s['file']}** ({s['data']}): {s['samples']} texts of the split {s['split']}{left_out}, prompts of "
        f"{s['prompt_tokens']:.0f} tokens on average, greedy answers of at most {s['max_tokens']} tokens. ROUGE F1 and "
        f"repetition in %; KL on the dense model's answers. {encoder}.",
        _table(["policy", *columns], rows),
    ]
    if s["differences"]:
        parts.append(_differences(s))
    return "\n\n".join(parts)


def _differences(s: Value) -> str:
    columns = {
        "R-L": ("rougeL", _signed_percent),
        "R-L to dense": ("rougeL_dense", _signed_percent),
        "KL (nats)": ("kl", _signed),
    }
    found = {(d["policy"], d["figure"]): d["estimate"] for d in s["differences"]}
    measured = {figure for _, figure in found}
    columns = {title: column for title, column in columns.items() if column[0] in measured}
    rows = [
        [policy, *(show(found.get((policy, key))) for key, show in columns.values())]
        for policy in dict.fromkeys(policy for policy, _ in found)
    ]
    return f"Minus the control `{s['control']}`, prompt by prompt:\n\n" + _table(["policy", *columns], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(e: Value | None) -> str:
    return _show(e, lambda x: f"{x:.4g}")


def _percent(e: Value | None) -> str:
    return _show(e, lambda x: f"{100 * x:.1f}")


def _signed(e: Value | None) -> str:
    return _show(e, lambda x: f"{x:+.4g}")


def _signed_percent(e: Value | None) -> str:
    return _show(e, lambda x: f"{100 * x:+.1f}")


def _show(e: Value | None, write: Any) -> str:
    if e is None:
        return "–"
    value, low, high = (None if e[key] is None else str(write(e[key])) for key in ("value", "low", "high"))
    return f"{value}" if low in (None, value) and high in (None, value) else f"{value} [{low}, {high}]"
