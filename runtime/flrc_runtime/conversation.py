"""Several turns on one KV cache: of a new turn, only what the cache does not hold is read."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from .any_decoder import AnyDecoder
from .engine import DEFAULT_MAX_TOKENS, GREEDY, Model, Request, Token, checked_request, decode
from .errors import EmptyPromptError, UsageError
from .policy import Policy
from .sampling import Sampling

Turn = dict[str, str]  # role and content
ROLES = ("system", "user", "assistant")


class Conversation:
    """What was said, and the model's memory of it.

    Positions of earlier turns stay as the stages computed them that read or wrote them. Where the chat template renders
    the past otherwise than it was generated, reading begins again at the first token that differs.

    Args:
        model: A loaded bundle with a chat template.
        messages: What was said before: an optional system message, then user and assistant in turn.

    Raises:
        UsageError: The bundle has no chat template, or the messages are not such.
    """

    def __init__(self, model: Model, messages: Sequence[Turn] = ()) -> None:
        if model.tokenizer.template is None:
            raise UsageError(
                f"{model.manifest.model.name} {model.tokenizer.why_no_chat}, so it cannot hold a conversation",
                hint="flrc-edge generate continues a text",
            )
        check_turns(messages)
        self._model = model
        self._messages = [dict(m) for m in messages]
        self._decoder: AnyDecoder | None = None
        self._ids: list[int] = []  # of the cache's positions, and perhaps one more
        self._answer: Generator[Token, None, None] | None = None
        self.reused = 0

    @property
    def messages(self) -> list[Turn]:
        """What was said: copies of the messages."""
        return [dict(m) for m in self._messages]

    @property
    def length(self) -> int:
        """Positions that the cache holds."""
        return 0 if self._decoder is None else self._decoder.length

    def ask(
        self,
        text: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = GREEDY,
        policy: Policy | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[Token, None, None]:
        """Say something and stream the answer.

        An answer that is abandoned ends there: what was said of it is the assistant's message. Only one runs at a time;
        a further question ends it.

        Args:
            text: The user's message.
            max_tokens: Of the answer.
            sampling: Greedy unless told otherwise.
            policy: Which stage computes which token of the answer; None for the bundle's schedule.
            stop: Strings that end the answer.

        Returns:
            The tokens; with the first, ``reused`` becomes the number of prompt tokens that the cache held.

        Raises:
            EmptyPromptError: There is no text.
            ContextOverflowError: The conversation leaves no room for an answer; it stays as it was.
            UsageError: An argument is out of range.
        """
        self._end_answer()
        if not text.strip():
            raise EmptyPromptError("the message is empty")
        question = {"role": "user", "content": text}
        request = checked_request(
            self._model,
            [*self._messages, question],
            max_tokens=max_tokens,
            sampling=sampling,
            policy=policy,
            stop=stop,
        )
        self._answer = self._answered(question, request)
        return self._answer

    def undo(self) -> bool:
        """Take back the last question and its answer; return whether there was one."""
        self._end_answer()
        last = max((i for i, m in enumerate(self._messages) if m["role"] == "user"), default=None)
        if last is None:
            return False
        del self._messages[last:]
        return True

    def reset(self, system: str | None = None) -> None:
        """Begin again, with a system message or none."""
        self._end_answer()
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def close(self) -> None:
        """Free the cache; what was said stays, and a further question reads it again."""
        self._end_answer()
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._ids = None, []

    def _answered(self, question: Turn, request: Request) -> Generator[Token, None, None]:
        """Answer, and remember what is said; a generator that is never asked for a token changes nothing."""
        if self._decoder is None:
            self._decoder = self._model.decoder()
        # The last token is read again even if it is held: its logits choose the first one of the answer.
        self.reused = min(_common(self._ids[: self.length], request.ids), len(request.ids) - 1)
        self._decoder.cache.rollback(self.reused)
        self._ids = list(request.ids)
        said: list[str] = []
        try:
            for token in decode(self._model, self._decoder, request):
                self._ids.append(token.token_id)
                said.append(token.text)
                yield token
        finally:
            if said:
                self._messages += [question, {"role": "assistant", "content": "".join(said)}]

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def check_turns(messages: Sequence[Turn]) -> None:
    """Check that messages are a conversation whose next turn is the user's.

    Raises:
        UsageError: They are not.
    """
    for i, message in enumerate(messages):
        if set(message) != {"role", "content"} or not all(isinstance(v, str) for v in message.values()):
            raise UsageError(f"message {i} does not have a role and a content")
        if message["role"] not in ROLES:
            raise UsageError(f"the role {message['role']!r} of message {i} is not one of {', '.join(ROLES)}")
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise UsageError("after a system message, user and assistant must take turns, the assistant last")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first entries two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
