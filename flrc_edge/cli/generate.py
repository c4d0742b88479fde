"""``flrc-edge generate``: stream an answer from a bundle."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flrc_edge.cli.decoding import (
    check_stage_options,
    policy_of,
    sampling_of,
    sampling_options,
    stage_options,
)
from flrc_edge.cli.loading import provider_option
from flrc_edge.cli.stage_text import StageText, printable, wants_color
from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_runtime.engine import Answer, Token

log = logging.getLogger(__name__)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Tokens of the answer, at most.")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer at this text (repeatable).")
@stage_options
@click.option(
    "--speculative",
    is_flag=True,
    help="Instead of the schedule, what stage 0 chooses in passes over several drafts of the last stage.",
)
@click.option("--context", type=int, default=None, metavar="TOKENS", help="Prompt and answer together.")
@click.option("--threads", type=int, default=None, metavar="N", help="Of one operator.")
@provider_option
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@click.option("--system", default=None, metavar="TEXT", help="System message before the prompt.")
@click.option("--show-stages", is_flag=True, help="Show which stage computed which part.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")
def command(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    stage: int | None,
    ms_per_token: float | None,
    mean_keep: float | None,
    speculative: bool,
    context: int | None,
    threads: int | None,
    providers: tuple[str, ...],
    raw: bool,
    system: str | None,
    show_stages: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Stream an answer to PROMPT (- reads it from stdin) from BUNDLE.

    The answer goes to stdout, its speed to stderr. Ctrl-C ends it and keeps the text so far.
    """
    from flrc_runtime import Speculation, load

    check_stage_options(stage=stage, ms_per_token=ms_per_token, mean_keep=mean_keep, speculative=speculative)
    chosen = sampling_of(sampling)
    model = load(
        bundle,
        context=context,
        threads=threads,
        providers=providers,
        stages=None if stage is None else (stage,),
    )
    stream = model.stream(
        _read_prompt(prompt),
        max_tokens=max_tokens,
        sampling=chosen,
        policy=policy_of(model, stage, ms_per_token, mean_keep),
        speculation=Speculation() if speculative else None,
        stop=stop,
        chat=False if raw else None,
        system=system,
    )
    tokens: list[Token] = []
    interrupted = False
    try:
        if as_json:
            tokens.extend(stream)
        else:
            _show(stream, tokens, show_stages=show_stages)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
        if not as_json:
            click.echo()
    _finish(tokens, as_json=as_json)
    if interrupted:
        raise click.Abort


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text at byte {error.start}") from None


def _show(stream: Iterator[Token], tokens: list[Token], *, show_stages: bool) -> None:
    """Write each piece as it comes."""
    marked = StageText(color=wants_color(sys.stdout)) if show_stages else None
    terminal = sys.stdout.isatty()
    for token in stream:
        tokens.append(token)
        text = printable(token.text) if terminal else token.text
        click.echo(marked.piece(text, token.stage) if marked else text, nl=False, color=True)


def _finish(tokens: list[Token], *, as_json: bool) -> None:
    """Write the JSON object, or the footer."""
    from flrc_runtime import Answer

    answer = Answer.of(tokens) if tokens else None
    if as_json:
        click.echo(json.dumps(_fields(answer), ensure_ascii=False))
    elif answer is not None:
        stages = Counter(answer.stage_of_token)
        counts = ", ".join(f"stage {stage}: {count}" for stage, count in sorted(stages.items()))
        log.info(
            "%d tokens (%s); prompt %d tokens at %.0f tok/s, decode %.1f tok/s",
            len(answer.token_ids),
            counts,
            answer.prompt_tokens,
            answer.prompt_tokens_per_second,
            answer.decode_tokens_per_second,
        )


def _fields(answer: Answer | None) -> dict[str, object]:
    if answer is None:  # interrupted before the first token
        return {"answer": "", "tokens": [], "stage_of_token": [], "finish_reason": "interrupted"}
    return {
        "answer": answer.text,
        "tokens": list(answer.token_ids),
        "stage_of_token": list(answer.stage_of_token),
        "prompt_tokens": answer.prompt_tokens,
        "prompt_tokens_per_second": answer.prompt_tokens_per_second,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
        "finish_reason": answer.finish_reason or "interrupted",
    }
