"""What ``flrc-edge report --measure`` measures of every stage, and how the page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flrc_edge.errors import UsageError
from flrc_edge.figures.measured_stages import Panel, draw_panels
from flrc_edge.html_report import AnswerSection, Piece, Table
from flrc_edge.progress import Progress, silent
from flrc_edge.report_parts import Part
from flrc_runtime.bench import BenchResult, Row, bench
from flrc_runtime.engine import Answer, Token
from flrc_runtime.manifest import Kind

PROMPTS = (
    "Why do leaves change color in autumn?",
    "What are the benefits of walking every day?",
    "Write a short story about a lighthouse keeper.",
)
Value = dict[str, Any]


@dataclass(frozen=True)
class MeasuredAnswer:
    """A greedy answer, in pieces of one stage each."""

    prompt: str
    pieces: tuple[Piece, ...]
    finish_reason: str
    tokens_per_second: float

    @classmethod
    def of(cls, prompt: str, tokens: Sequence[Token]) -> MeasuredAnswer:
        """Join neighbouring tokens of a stage; text that a token holds back belongs to the one that completes it."""
        pieces: list[Piece] = []
        for token in tokens:
            if pieces and not pieces[-1].text:
                pieces[-1] = Piece(token.stage, token.text)
            elif pieces and (pieces[-1].stage == token.stage or not token.text):
                pieces[-1] = Piece(pieces[-1].stage, pieces[-1].text + token.text)
            else:
                pieces.append(Piece(token.stage, token.text))
        answer = Answer.of(tokens)
        return cls(prompt, tuple(pieces), answer.finish_reason or "cut off", answer.decode_tokens_per_second)


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Args:
        evaluation: As ``flrc-edge eval --json`` prints it.
        speed: None of a checkpoint, which has no graphs.
        answers: None of a checkpoint.
    """

    evaluation: Value
    speed: BenchResult | None = None
    answers: tuple[MeasuredAnswer, ...] = ()


def measure_stages(
    folder: Path,
    kind: Kind,
    *,
    dense: str | None = None,
    windows: int = 4,
    prompts: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Measured:
    """Measure perplexity of every stage on held-out texts and, of a bundle, speed, memory and sample answers.

    Args:
        folder: A checkpoint or bundle.
        kind: Which of them.
        dense: The dense model (as ``flrc-edge eval --dense``), for divergence.
        windows: Of each text.
        prompts: To answer, greedily; none for ``PROMPTS``.
        threads: Of one operator.
        progress: Called after each unit of work.

    Raises:
        FlrcError: Anything a user can mend.
    """
    from flrc_edge.evaluation.evaluate import Settings, evaluate
    from flrc_edge.evaluation.subject import open_subject

    if kind != "bundle" and prompts:
        raise UsageError("--prompt needs a bundle", hint="flrc-edge export writes one")
    subject = open_subject(str(folder))
    reference = None if dense is None else open_subject(dense)
    evaluation = evaluate(subject, Settings(windows=windows), dense=reference, progress=progress).as_dict()
    del subject, reference
    if kind != "bundle":
        return Measured(evaluation)
    speed = bench([folder], decode_tokens=64, threads=threads, loading=True, progress=progress)
    return Measured(evaluation, speed, _answers(folder, prompts or PROMPTS, threads, progress))


def _answers(
    folder: Path, prompts: Sequence[str], threads: int | None, progress: Progress
) -> tuple[MeasuredAnswer, ...]:
    from flrc_runtime import load

    model = load(folder, threads=threads)
    found = []
    for i, prompt in enumerate(prompts):
        found.append(MeasuredAnswer.of(prompt, list(model.stream(prompt, max_tokens=128))))
        progress("sample answers", i + 1, len(prompts))
    return tuple(found)


def measured_parts(measured: Measured) -> list[Part | AnswerSection]:
    """Return the sections of the page."""
    parts: list[Part | AnswerSection] = [_quality(measured.evaluation)]
    if measured.speed is not None:
        parts += [_speed(measured.speed), *_memory(measured.speed)]
    if measured.answers:
        parts.append(_sample_answers(measured.answers))
    return parts


def _quality(evaluation: Value) -> Part:
    panels, tables, sentences = [], [], []
    stages: list[str] = []
    for text in evaluation["texts"]:
        rows = [f for f in text["figures"] if f["stage"] != "dense"]
        stages = [_policy_name(f["stage"]) for f in rows]
        dense = next((f["estimates"] for f in text["figures"] if f["stage"] == "dense"), None)
        reference = None if dense is None else dense["perplexity"]["value"]
        panels.append(_panel(f"perplexity, {text['text']}", rows, "perplexity", reference))
        if dense is not None:
            panels.append(_panel(f"KL to dense, nats, {text['text']}", rows, "kl", None))
        values = [f["estimates"]["perplexity"]["value"] for f in rows]
        sentences.append(
            f"{text['text']} ({text['tokens']:,} tokens): "
            + ", ".join(f"{v:.1f}" for v in values)
            + ("" if reference is None else f", the dense model {reference:.1f}")
        )
        header = {
            "perplexity": "perplexity",
            "bits_per_byte": "bits a byte",
            "kl": "KL (nats)",
            "top1": "same top token",
        }
        measured = [key for key in header if any(key in f["estimates"] for f in rows)]
        tables.append(
            Table(
                f"{text['text']}: {text['windows']} windows of {text['window']} tokens",
                ("stage", "keep", *(header[key] for key in measured)),
                tuple(
                    (
                        _policy_name(f["stage"]),
                        f"{f['keep']:.3f}",
                        *(_interval(f["estimates"].get(key)) for key in measured),
                    )
                    for f in text["figures"]
                ),
            )
        )
    return Part(
        "quality",
        "How good the stages are",
        "Perplexity on held-out text, lower is better, with 95 % intervals over windows. "
        + "; ".join(sentences)
        + ".",
        f"Dot charts, a row for each of {len(stages)} stages. The numbers are in the tables below.",
        draw_panels(stages, panels, from_zero=False),
        tuple(tables),
    )


def _policy_name(policy: str) -> str:
    """``static:0`` of an evaluation -> ``stage 0``."""
    return policy.replace("static:", "stage ")


def _stage_name(stage: str) -> str:
    """``0`` of a benchmark -> ``stage 0``; ``schedule`` stays."""
    return f"stage {stage}" if stage.isdigit() else stage


def _panel(title: str, rows: Sequence[Value], key: str, reference: float | None) -> Panel:
    found = [f["estimates"][key] for f in rows]
    values = tuple(e["value"] for e in found)
    low = tuple(e["value"] if e["low"] is None else e["low"] for e in found)
    high = tuple(e["value"] if e["high"] is None else e["high"] for e in found)
    return Panel(title, values, low, high, reference)


def _interval(estimate: Value | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return f"{value:.4g}" if low is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _speed(speed: BenchResult) -> Part:
    shown = [r for r in speed.rows if r.stage.isdigit()]
    decode = {r.stage: r for r in shown if r.test == "decode"}
    prompt = {r.stage: r for r in shown if r.test == "prompt"}
    names = [_stage_name(s) for s in decode]
    panels = [_times("ms a token, decoding", list(decode.values()))]
    if decode.keys() <= prompt.keys():
        panels.append(_times("ms a token, reading a prompt", [prompt[s] for s in decode]))
    first = next(iter(decode.values()))
    return Part(
        "speed",
        "How fast the stages are",
        f"Time a token, lower is better; the median of turns and the range of their middle half. Stage 0 "
        f"decodes {first.tokens_per_second:.0f} tokens a second. {speed.machine}; "
        f"{'onnxruntime chooses' if speed.threads is None else speed.threads} threads; memory reads "
        f"{speed.bandwidth / 1e9:.0f} GB a second.",
        f"Bar charts, a row for each of {len(names)} stages. The numbers are in the table below.",
        draw_panels(names, panels, from_zero=True),
        (
            Table(
                f"Decoding begins behind {first.tokens} tokens",
                ("stage", "test", "tokens", "ms a token", "± range", "tokens a second", "GB a second"),
                tuple(
                    (
                        _stage_name(r.stage),
                        r.test,
                        str(r.tokens) if r.test == "prompt" else "1",
                        f"{r.ms_per_token:.2f}",
                        f"{r.ms_spread:.2f}",
                        f"{r.tokens_per_second:.1f}",
                        "–" if r.gb_per_second is None else f"{r.gb_per_second:.1f}",
                    )
                    for r in shown
                ),
            ),
        ),
    )


def _times(title: str, rows: Sequence[Row]) -> Panel:
    half = [r.ms_spread / 2 for r in rows]
    values = tuple(r.ms_per_token for r in rows)
    low = tuple(v - h for v, h in zip(values, half, strict=True))
    high = tuple(v + h for v, h in zip(values, half, strict=True))
    return Panel(title, values, low, high)


def _memory(speed: BenchResult) -> list[Part]:
    rows = [r for r in speed.loading if r.used_bytes is not None]
    if not rows:
        return []
    names = ["all stages" if r.stages > 1 else "stage 0" for r in rows]
    used = tuple((r.used_bytes or 0) / 1e6 for r in rows)
    loaded = tuple((r.loaded_bytes or 0) / 1e6 for r in rows)
    return [
        Part(
            "memory",
            "What they hold in memory",
            "Memory (proportional set size) after loading and after every opened stage was used: "
            + ", ".join(f"{name} {value:,.0f} MB" for name, value in zip(names, used, strict=True))
            + ". Stages share their weights.",
            f"Bar charts, {len(names)} ways to open the bundle. The numbers are in the table below.",
            draw_panels(
                names,
                [Panel("MB after use", used, used, used), Panel("MB after loading", loaded, loaded, loaded)],
                from_zero=True,
            ),
            (
                Table(
                    "Opening the bundle, each time in a process of its own",
                    (
                        "opened",
                        "first token, seconds",
                        "opening",
                        "MB loaded",
                        "MB used",
                        "MB private",
                        "MB on disk",
                    ),
                    tuple(
                        (
                            name,
                            f"{r.first_token_seconds:.2f}",
                            f"{r.open_seconds:.2f}",
                            *(
                                "–" if v is None else f"{v / 1e6:,.0f}"
                                for v in (
                                    r.loaded_bytes,
                                    r.used_bytes,
                                    r.private_bytes,
                                    r.file_bytes,
                                )
                            ),
                        )
                        for name, r in zip(names, rows, strict=True)
                    ),
                ),
            ),
        )
    ]


def _sample_answers(answers: Sequence[MeasuredAnswer]) -> AnswerSection:
    stages = sorted({piece.stage for a in answers for piece in a.pieces})
    moved = (
        "All of them came from stage 0: the schedule moves on later, or never."
        if stages == [0]
        else "A small number says which stage computed what follows, and its colour, too."
    )
    return AnswerSection(
        "answers",
        "What it answers",
        f"Greedy answers of at most 128 tokens. {moved}",
        tuple(
            (a.prompt, a.pieces, f"{a.tokens_per_second:.0f} tokens a second, {a.finish_reason}")
            for a in answers
        ),
    )
