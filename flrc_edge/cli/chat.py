"""``flrc-edge chat``: talk to a bundle."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
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
from flrc_edge.cli.saved_chat import check_new, read_messages, write_messages
from flrc_edge.cli.stage_text import StageText, printable, wants_color
from flrc_edge.cli.typed_lines import history, turns
from flrc_edge.errors import ContextOverflowError, FlrcError, UsageError

if TYPE_CHECKING:
    from flrc_runtime.conversation import Conversation
    from flrc_runtime.engine import Answer, Model, Token
    from flrc_runtime.policy import Policy
    from flrc_runtime.sampling import Sampling

HELP = """\
/stage N     answer with stage N alone; /stage schedule goes back to the bundle's schedule
/system TEXT begin again with a system message
/reset       begin again
/undo        take back the last question and its answer
/save FILE   write the conversation as JSON; /load FILE goes on with one
/quit        leave, as Ctrl-D does; Ctrl-C ends an answer and keeps what was said
A line that ends in a backslash goes on in the next one; so does all between \"\"\" and \"\"\"."""
log = logging.getLogger(__name__)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", default=None, metavar="TEXT", help="System message.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Tokens of an answer, at most.")
@sampling_options
@stage_options
@click.option("--context", type=int, default=None, metavar="TOKENS", help="The whole conversation, at most.")
@click.option("--threads", type=int, default=None, metavar="N", help="Of one operator.")
@provider_option
@click.option("--show-stages", is_flag=True, help="Show which stage computed which part.")
@click.option("--load", "loaded", type=click.Path(path_type=Path), help="Go on with a saved conversation.")
@click.option("--save", "saved", type=click.Path(path_type=Path), help="Save the conversation when it ends.")
@click.option(
    "--history",
    "history_file",
    type=click.Path(path_type=Path),
    help="File that keeps what was typed, for the arrow keys.",
)
def command(
    bundle: Path,
    system: str | None,
    max_tokens: int,
    stage: int | None,
    ms_per_token: float | None,
    mean_keep: float | None,
    context: int | None,
    threads: int | None,
    providers: tuple[str, ...],
    show_stages: bool,
    loaded: Path | None,
    saved: Path | None,
    history_file: Path | None,
    **sampling: Any,
) -> None:
    """Talk to BUNDLE: what you type is answered, /help shows what else it can do.

    The KV cache is kept, so only what is new is read. Answers go to stdout, all else to stderr; where stdin is not a
    terminal, every line of it is a turn.
    """
    from flrc_runtime import Conversation, load

    check_stage_options(stage=stage, ms_per_token=ms_per_token, mean_keep=mean_keep)
    if system is not None and loaded is not None:
        raise UsageError("--system and --load exclude each other: a saved conversation has its own")
    if saved is not None:
        check_new(saved)
    chosen = sampling_of(sampling)
    messages = [] if loaded is None else read_messages(loaded)
    if system is not None:
        messages = [{"role": "system", "content": system}]
    model = load(bundle, context=context, threads=threads, providers=providers)
    policy = policy_of(model, stage, ms_per_token, mean_keep)
    session = Session(
        model,
        Conversation(model, messages),
        sampling=chosen,
        policy=policy,
        max_tokens=max_tokens,
        show_stages=show_stages,
    )
    if sys.stdin.isatty():
        name = model.manifest.model.name
        log.info("%s, %d stages. /help shows what can be typed, Ctrl-D leaves.", name, model.num_stages)
    try:
        with history(history_file):
            for text in turns():
                if not session.turn(text):
                    break
    finally:
        if saved is not None and session.said:
            session.save(saved)


class Session:
    """The conversation of one terminal.

    Args:
        model: A loaded bundle.
        conversation: With it.
        sampling: Of every answer.
        policy: Which stage computes a token; None for the bundle's schedule.
        max_tokens: Of an answer.
        show_stages: Mark the parts of an answer by their stage.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        *,
        sampling: Sampling,
        policy: Policy | None,
        max_tokens: int,
        show_stages: bool,
    ) -> None:
        self._model, self._conversation = model, conversation
        self._sampling, self._policy = sampling, policy
        self._max_tokens, self._show_stages = max_tokens, show_stages
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: click.echo(HELP, err=True),
            "stage": self._set_stage,
            "system": self._set_system,
            "reset": lambda _: self._conversation.reset(),
            "undo": self._undo,
            "save": self._save,
            "load": self._load,
        }

    def turn(self, text: str) -> bool:
        """Answer a message or do what a command says; return whether to go on.

        What a user can mend is said in a sentence, and the conversation stays as it was.
        """
        name, _, argument = text[1:].partition(" ")
        try:
            if not text.startswith("/"):
                self._answer(text)
            elif name in ("quit", "exit"):
                return False
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                raise UsageError(f"there is no command /{name}", hint="/help lists them")
        except FlrcError as error:
            click.echo(f"Error: {error}", err=True)
            full = isinstance(error, ContextOverflowError)
            hint = "/undo takes back a turn, /reset begins again" if full else error.hint
            if hint:
                click.echo(f"Hint: {hint}", err=True)
        return True

    @property
    def said(self) -> bool:
        """Whether anything was asked and answered."""
        return any(m["role"] == "user" for m in self._conversation.messages)

    def save(self, path: Path) -> None:
        """Write the conversation into a new file; the errors are those of :func:`write_messages`."""
        messages = self._conversation.messages
        write_messages(path, messages, model=self._model.manifest.model.name)
        click.echo(f"{path} holds {len(messages)} messages", err=True)

    def _answer(self, text: str) -> None:
        if not text.strip():
            return
        tokens: list[Token] = []
        try:
            with closing(self._ask(text)) as stream:
                self._show(stream, tokens)
        except KeyboardInterrupt:  # what was said so far is the answer
            if not tokens:
                click.echo("Nothing was answered, so the question is forgotten.", err=True)
        if tokens:
            from flrc_runtime import Answer

            log.info("%s", self._footer(Answer.of(tokens)))

    def _ask(self, text: str) -> Generator[Token, None, None]:
        return self._conversation.ask(
            text, max_tokens=self._max_tokens, sampling=self._sampling, policy=self._policy
        )

    def _show(self, stream: Iterator[Token], tokens: list[Token]) -> None:
        marked = StageText(color=wants_color(sys.stdout)) if self._show_stages else None
        terminal = sys.stdout.isatty()
        try:
            for token in stream:
                tokens.append(token)
                piece = printable(token.text) if terminal else token.text
                click.echo(marked.piece(piece, token.stage) if marked else piece, nl=False, color=True)
        finally:
            click.echo()

    def _footer(self, answer: Answer) -> str:
        plan = self._model.manifest.plan
        stages = Counter(answer.stage_of_token)
        keep = sum(plan.kept(s) * n for s, n in stages.items()) / len(answer.token_ids)
        counts = ", ".join(f"stage {stage}: {count}" for stage, count in sorted(stages.items()))
        read = answer.prompt_tokens - self._conversation.reused
        text = (
            f"[{len(answer.token_ids)} tokens ({counts}), keep {keep:.2f}, "
            f"{answer.decode_tokens_per_second:.1f} tok/s; "
            f"{read} of {answer.prompt_tokens} prompt tokens read; "
            f"{self._conversation.length} of {self._model.context} positions]"
        )
        return click.style(text, dim=True) if wants_color(sys.stderr) else text

    def _set_stage(self, argument: str) -> None:
        from flrc_runtime.policy import FixedStage, checked_stage

        if argument == "schedule":
            self._policy = None
            return
        if not argument.isdecimal():
            raise UsageError(f"/stage takes a number or the word schedule, not {argument!r}")
        self._policy = FixedStage(checked_stage(int(argument), self._model.num_stages))

    def _set_system(self, argument: str) -> None:
        if not argument:
            raise UsageError("/system needs a text; /reset begins again without one")
        self._conversation.reset(argument)

    def _undo(self, _: str) -> None:
        if not self._conversation.undo():
            raise UsageError("nothing was said yet")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save needs the name of a file")
        self.save(Path(argument).expanduser())

    def _load(self, argument: str) -> None:
        from flrc_runtime import Conversation

        found = Conversation(self._model, read_messages(Path(argument).expanduser()))
        self._conversation.close()
        self._conversation = found
