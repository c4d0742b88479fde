"""Prompt in, tokens out: the decode loop over the stages of a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .any_decoder import AnyDecoder
from .decoder import Decoder, default_chunk
from .device_decoder import DeviceDecoder
from .errors import ContextOverflowError, EmptyPromptError, UsageError
from .manifest import Manifest
from .policy import FixedStage, Policy, SchedulePolicy, StepState, checked_stage, prompt_stage
from .sampling import LogProbabilities, Sampler, Sampling, log_probabilities
from .sessions import StageSessions
from .speculative import Speculation, Speculator, checked_draft_stage
from .text_stream import Detokenizer, StopStrings
from .tokenizer import Tokenizer
from .window_decoder import WindowDecoder, WindowSessions

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]
# Text; messages with role and content; or token ids, which are taken as they are.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

GREEDY = Sampling()
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Token:
    """One step of an answer.

    Args:
        text: What is certain of the text now; may be empty while a character or stop string is incomplete.
        token_id: The chosen token.
        stage: The stage that computed it.
        position: Its place in the sequence, the prompt's first token being 0.
        index: Its place in the answer.
        prompt_tokens: Tokens of the prompt.
        prompt_tokens_per_second: Speed of reading what of the prompt was not in the KV cache.
        decode_tokens_per_second: Speed since then, without the consumer's time; 0 at the first token.
        finish_reason: None until the last token; then ``stop`` (end token or stop string) or ``length``.
        logprobs: Log probabilities, if they were asked for.
    """

    text: str
    token_id: int
    stage: int
    position: int
    index: int
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    finish_reason: FinishReason | None
    logprobs: LogProbabilities | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text, token ids, the stage of every token, and the speeds of the last token."""

    text: str
    token_ids: tuple[int, ...]
    stage_of_token: tuple[int, ...]
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    finish_reason: FinishReason | None  # None: cut off before the end

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Answer:
        """Put the tokens of a stream together."""
        last = tokens[-1]
        return cls(
            text="".join(t.text for t in tokens),
            token_ids=tuple(t.token_id for t in tokens),
            stage_of_token=tuple(t.stage for t in tokens),
            prompt_tokens=last.prompt_tokens,
            prompt_tokens_per_second=last.prompt_tokens_per_second,
            decode_tokens_per_second=last.decode_tokens_per_second,
            finish_reason=last.finish_reason,
        )


class Model:
    """A loaded bundle. Streams share its sessions; each has its own KV cache, so they may run side by side.

    Args:
        manifest: Of the bundle.
        tokenizer: Of the bundle.
        sessions: Of its stages.
        context: Tokens of prompt and answer together.
    """

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, sessions: StageSessions, *, context: int
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.sessions = sessions
        self.context = context

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return self.sessions.count

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of one stream with a full context."""
        return self.sessions.kv_shape.bytes_for(self.context)

    def decoder(self) -> AnyDecoder:
        """Return a new sequence: token ids in, logits out; the caller closes it."""
        if isinstance(self.sessions, WindowSessions):
            return WindowDecoder(self.sessions, context=self.context)
        fused = Decoder if self.sessions.device is None else DeviceDecoder
        return fused(self.sessions, context=self.context, vocab_size=self.manifest.model.vocab_size)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = GREEDY,
        policy: Policy | None = None,
        speculation: Speculation | None = None,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
        top_logprobs: int | None = None,
    ) -> Generator[Token, None, None]:
        """Answer a prompt token by token; see :func:`stream`."""
        return stream(
            self,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            policy=policy,
            speculation=speculation,
            stop=stop,
            chat=chat,
            system=system,
            top_logprobs=top_logprobs,
        )

    def logits(
        self, ids: Sequence[int], *, stages: int | Sequence[int] = 0, chunk: int | None = None
    ) -> NDArray[np.float32]:
        """Feed given tokens through given stages (teacher forcing).

        Args:
            ids: Token ids, at most the context.
            stages: One for all, or one per token; each token is fed through its stage.
            chunk: Most tokens fed at once; None for a size that bounds memory.

        Returns:
            Logits [len(ids), vocab] float32 of the token after each.

        Raises:
            EmptyPromptError: There is no token.
            ContextOverflowError: There are more than the context holds.
            UsageError: An id, stage or chunk is out of range, or there are not as many stages as tokens.
        """
        ids = self.checked_ids(ids)
        if len(ids) > self.context:
            raise ContextOverflowError(len(ids), self.context)
        of_token = [stages] * len(ids) if isinstance(stages, int) else list(stages)
        if len(of_token) != len(ids):
            raise UsageError(f"{len(of_token)} stages do not fit {len(ids)} tokens")
        for stage in of_token:
            checked_stage(stage, self.num_stages)
        vocab_size = self.manifest.model.vocab_size
        size = default_chunk(vocab_size) if chunk is None else chunk
        if size < 1:
            raise UsageError(f"chunk {chunk} is not a positive number of tokens")
        result = np.empty((len(ids), vocab_size), np.float32)
        decoder = self.decoder()
        try:
            start = 0
            while start < len(ids):
                end = start + 1
                while end < min(start + size, len(ids)) and of_token[end] == of_token[start]:
                    end += 1
                result[start:end] = decoder.feed(ids[start:end], of_token[start])
                start = end
        finally:
            decoder.close()
        return result

    def prompt_ids(self, prompt: Prompt, *, chat: bool | None = None, system: str | None = None) -> list[int]:
        """Return the token ids of a prompt as :func:`stream` feeds them."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise EmptyPromptError("the prompt is empty")
            if self.through_template(prompt, chat=chat):
                messages = [{"role": "system", "content": system}] if system is not None else []
                said = [*messages, {"role": "user", "content": prompt}]
                return self.tokenizer.encode_chat(said, most=self.context)
            if system is not None:
                raise UsageError("a system text needs the chat template", hint="leave out --raw")
            return self.checked_ids(self.tokenizer.encode(prompt, most=self.context))
        if not prompt:
            raise EmptyPromptError("the prompt is empty")
        if self.through_template(prompt):
            return self.tokenizer.encode_chat(prompt, most=self.context)  # type: ignore[arg-type]
        return self.checked_ids(prompt)  # type: ignore[arg-type]

    def through_template(self, prompt: Prompt, *, chat: bool | None = None) -> bool:
        """Whether a prompt goes through the chat template; if not, the answer goes on with its text."""
        if isinstance(prompt, str):
            return self.tokenizer.template is not None if chat is None else chat
        return all(isinstance(m, Mapping) for m in prompt)

    def checked_ids(self, ids: Sequence[int]) -> list[int]:
        """Return token ids as a list.

        Raises:
            EmptyPromptError: There is none.
            UsageError: One lies outside the vocabulary.
        """
        values = [int(i) for i in ids]
        if not values:
            raise EmptyPromptError("the prompt holds no token")
        vocab_size = self.manifest.model.vocab_size
        if min(values) < 0 or max(values) >= vocab_size:
            raise UsageError(f"the prompt holds a token id outside the vocabulary of {vocab_size}")
        return values


def stream(
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    policy: Policy | None = None,
    speculation: Speculation | None = None,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    system: str | None = None,
    top_logprobs: int | None = None,
) -> Generator[Token, None, None]:
    """Answer a prompt token by token.

    Args:
        model: A loaded bundle.
        prompt: Text, messages (always through the chat template) or token ids (never).
        max_tokens: Of the answer; fewer if the context is full before.
        sampling: Greedy unless told otherwise.
        policy: Which stage computes which token; None for the bundle's schedule.
        speculation: Answer as stage 0 does, with drafts of a later stage; instead of a policy.
        stop: Strings that end the answer and are not part of it.
        chat: Whether a text goes through the chat template; None: if the bundle has one.
        system: System message before a text.
        top_logprobs: How many most likely tokens to name beside every chosen one, with log probabilities; None: no
            log probabilities are computed.

    Returns:
        A generator of tokens; closing or dropping it frees its buffers.

    Raises:
        EmptyPromptError: The prompt holds no token.
        ContextOverflowError: It leaves no room for an answer.
        UsageError: An argument is out of range. All three at once; these while iterating:
        NumericalError: Logits are not finite.
        FlrcError: A graph fails.
    """
    return _alone(
        model,
        checked_request(
            model,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            policy=policy,
            speculation=speculation,
            stop=stop,
            chat=chat,
            system=system,
            top_logprobs=top_logprobs,
        ),
    )


def generate(
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    policy: Policy | None = None,
    speculation: Speculation | None = None,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    system: str | None = None,
) -> Answer:
    """Answer a prompt at once; the arguments and errors are those of :func:`stream`."""
    tokens = stream(
        model,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        policy=policy,
        speculation=speculation,
        stop=stop,
        chat=chat,
        system=system,
    )
    return Answer.of(list(tokens))


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it, checked against a model.

    Args:
        ids: Token ids of the prompt.
        count: Tokens of the answer, at most.
        sampling: How a token is chosen.
        policy: Which stage computes which token.
        prompt_stage: The stage that reads the prompt.
        stops: Of this answer alone.
        goes_on: Whether the answer goes on with the text of the prompt, or is a text of its own.
        speculation: If drafts are to be verified.
        top_logprobs: See :func:`stream`.
    """

    ids: Sequence[int]
    count: int
    sampling: Sampling
    policy: Policy
    prompt_stage: int
    stops: StopStrings
    goes_on: bool
    speculation: Speculation | None = None
    top_logprobs: int | None = None


def checked_request(
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    policy: Policy | None = None,
    speculation: Speculation | None = None,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    system: str | None = None,
    top_logprobs: int | None = None,
) -> Request:
    """Check the arguments of :func:`stream` and turn the prompt into token ids; the errors are those named there."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise UsageError(f"max_tokens {max_tokens!r} is not a positive integer")
    if speculation is not None:
        if policy is not None:
            raise UsageError("speculation decodes with stage 0, it takes no policy")
        if top_logprobs is not None:
            raise UsageError("speculation verifies several tokens at once and gives no log probabilities")
        checked_draft_stage(speculation, model.num_stages)
        policy = FixedStage(0)
    vocab = model.manifest.model.vocab_size
    if top_logprobs is not None and not 0 <= top_logprobs <= vocab:
        raise UsageError(f"top_logprobs {top_logprobs!r} is not from 0 to {vocab}")
    chosen = SchedulePolicy(model.manifest.schedule) if policy is None else policy
    first_stage = checked_stage(prompt_stage(chosen), model.num_stages)
    stops = StopStrings(stop)
    ids = model.checked_ids(model.prompt_ids(prompt, chat=chat, system=system))
    if len(ids) >= model.context:
        raise ContextOverflowError(len(ids), model.context)
    count = min(max_tokens, model.context - len(ids))
    goes_on = not model.through_template(prompt, chat=chat)
    return Request(ids, count, sampling, chosen, first_stage, stops, goes_on, speculation, top_logprobs)


def _alone(model: Model, request: Request) -> Generator[Token, None, None]:
    """Answer in a sequence of its own."""
    decoder = model.decoder()
    try:
        yield from decode(model, decoder, request)
    finally:
        decoder.close()


class _Clock:
    """What decode steps took, without the consumer's time."""

    def __init__(self) -> None:
        self.busy = 0.0  # seconds
        self.last_ms = 0.0


def decode(model: Model, decoder: AnyDecoder, request: Request) -> Generator[Token, None, None]:
    """Yield the tokens of an answer.

    Args:
        model: Of the sequence.
        decoder: Holds the first tokens of the prompt, perhaps none; the rest is read now.
        request: What to answer.
    """
    ids = request.ids
    new = ids[decoder.length :]
    ends = frozenset(model.manifest.model.eos_token_ids)
    detokenizer = Detokenizer(model.tokenizer, ids if request.goes_on else ())
    stops = request.stops
    sampler = Sampler(request.sampling, ids)
    now = time.perf_counter
    clock = _Clock()
    if request.speculation is None:
        chosen: Iterator[_Chosen] = _one_by_one(decoder, sampler, request, new, clock, model.num_stages)
    else:
        speculator = Speculator(decoder, sampler, request.speculation, stages=model.num_stages, ends=ends)
        chosen = ((token, 0, None) for token in speculator.tokens(new))
    prompt_speed = 0.0
    for index in range(request.count):
        begun = now()
        token, stage, logprobs = next(chosen)
        text = "" if token in ends else stops.push(detokenizer.push(token))
        reason: FinishReason | None = None
        if token in ends or stops.stopped():
            reason = "stop"
        elif index == request.count - 1:
            reason = "length"
        if reason is not None and not stops.stopped():
            text += stops.push(detokenizer.flush()) + stops.flush()
            if stops.stopped():  # the held-back bytes completed a stop string
                reason = "stop"
        took = now() - begun
        if index:
            clock.last_ms = took * 1e3
            clock.busy += took
        else:
            prompt_speed = len(new) / max(took, 1e-9)
        yield Token(
            text=text,
            token_id=token,
            stage=stage,
            position=len(ids) + index,
            index=index,
            prompt_tokens=len(ids),
            prompt_tokens_per_second=prompt_speed,
            decode_tokens_per_second=index / clock.busy if clock.busy else 0.0,
            finish_reason=reason,
            logprobs=logprobs,
        )
        if reason is not None:
            return


_Chosen = tuple[int, int, LogProbabilities | None]  # token, stage, log probabilities


def _one_by_one(
    decoder: AnyDecoder, sampler: Sampler, request: Request, new: Sequence[int], clock: _Clock, stages: int
) -> Iterator[_Chosen]:
    """Yield tokens, each computed when it is asked for."""
    stage, policy, top = request.prompt_stage, request.policy, request.top_logprobs
    logits = decoder.prefill(new, stage)
    for index in count_from(1):
        token = sampler(logits, stage=stage, position=decoder.length - 1)
        yield token, stage, None if top is None else log_probabilities(logits, token, top)
        previous = stage
        stage = policy(StepState(index, decoder.length, clock.last_ms, previous))
        if stage != previous:
            checked_stage(stage, stages)
            log.debug("token %d: stage %d to %d", index, previous, stage)
        logits = decoder.step(token, stage)
