"""Turns on one KV cache answer as fresh prompts of the same messages do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from flrc_runtime import (
    Answer,
    ContextOverflowError,
    Conversation,
    EmptyPromptError,
    FixedStage,
    Sampling,
    UsageError,
    generate,
    load,
)
from flrc_runtime.chat_template import ChatTemplate
from flrc_runtime.engine import Model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTIONS = ("Once upon a time", "Lily and Tom went to the park", "The end was happy")


def talking(model: Model) -> Model:
    """The model with a chat template, which stories260k has none of."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.template = ChatTemplate(TEMPLATE, {})
    return Model(model.manifest, tokenizer, model.sessions, context=model.context)


@pytest.fixture
def chat(model: Model) -> Model:
    return talking(model)


def ask(conversation: Conversation, text: str, **options: Any) -> Answer:
    return Answer.of(list(conversation.ask(text, max_tokens=12, **options)))


def test_turns_equal_fresh_prompts_and_are_read_once(chat: Model) -> None:
    conversation = Conversation(chat)
    messages: list[dict[str, str]] = []
    for turn, text in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": text})
        answer = ask(conversation, text, policy=FixedStage(0))
        fresh = generate(chat, messages, max_tokens=12, policy=FixedStage(0))
        assert answer.token_ids == fresh.token_ids and answer.prompt_tokens == fresh.prompt_tokens
        messages.append({"role": "assistant", "content": answer.text})
        assert conversation.messages == messages
        read = answer.prompt_tokens - conversation.reused
        if turn:
            question = len(chat.tokenizer.encode(text))
            assert conversation.reused > 0 and read < question + 30
        else:
            assert conversation.reused == 0
    assert conversation.length == answer.prompt_tokens + 11  # the last token was not fed
    conversation.close()


def test_another_stage_goes_on_from_the_same_cache(chat: Model) -> None:
    conversation = Conversation(chat)
    ask(conversation, QUESTIONS[0], policy=FixedStage(1))
    answer = ask(conversation, QUESTIONS[1])
    assert answer.stage_of_token == (0,) * 8 + (1,) * 4 and conversation.reused > 0


def test_an_abandoned_answer_is_what_was_said(chat: Model) -> None:
    conversation = Conversation(chat)
    stream = conversation.ask(QUESTIONS[0], max_tokens=40)
    said = "".join(next(stream).text for _ in range(5))
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    after = ask(conversation, QUESTIONS[1], policy=FixedStage(0))
    fresh = generate(chat, conversation.messages[:-1], max_tokens=12, policy=FixedStage(0))
    assert after.token_ids == fresh.token_ids


def test_a_further_question_ends_the_answer_before(chat: Model) -> None:
    conversation = Conversation(chat)
    first = conversation.ask(QUESTIONS[0])
    next(first)
    unheard = conversation.ask(QUESTIONS[1])
    assert list(first) == [] and len(conversation.messages) == 2
    ask(conversation, QUESTIONS[2])
    assert list(unheard) == []
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == [
        QUESTIONS[0],
        QUESTIONS[2],
    ]


def test_undo_and_reset(chat: Model) -> None:
    conversation = Conversation(chat)
    first = ask(conversation, QUESTIONS[0], policy=FixedStage(0))
    second = ask(conversation, QUESTIONS[1], policy=FixedStage(0))
    assert conversation.undo() and len(conversation.messages) == 2
    assert ask(conversation, QUESTIONS[1], policy=FixedStage(0)).token_ids == second.token_ids
    conversation.reset()
    assert conversation.messages == [] and not conversation.undo()
    assert ask(conversation, QUESTIONS[0], policy=FixedStage(0)).token_ids == first.token_ids
    conversation.reset("You tell stories.")
    answer = ask(conversation, QUESTIONS[0])
    assert conversation.messages[0] == {"role": "system", "content": "You tell stories."}
    assert answer.token_ids != first.token_ids


def test_a_conversation_goes_on_where_it_was_saved(chat: Model) -> None:
    conversation = Conversation(chat)
    for text in QUESTIONS[:2]:
        ask(conversation, text, policy=FixedStage(0))
    other = Conversation(chat, conversation.messages)
    conversation.close()
    a, b = (ask(c, QUESTIONS[2], policy=FixedStage(0)) for c in (conversation, other))
    assert a.token_ids == b.token_ids and conversation.reused == other.reused == 0


def test_sampling_with_a_seed_repeats(chat: Model) -> None:
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=1.2)
    conversation = Conversation(chat)
    ask(conversation, QUESTIONS[0])
    first = ask(conversation, QUESTIONS[1], sampling=sampling, policy=FixedStage(0))
    fresh = generate(chat, conversation.messages[:-1], max_tokens=12, sampling=sampling, policy=FixedStage(0))
    # The first answer was stage 1's in part, so the cache differs; the seed's draws do not.
    again = Conversation(chat)
    ask(again, QUESTIONS[0])
    assert ask(again, QUESTIONS[1], sampling=sampling, policy=FixedStage(0)).token_ids == first.token_ids
    assert len(fresh.token_ids) == len(first.token_ids)


def test_a_full_context_leaves_the_conversation_as_it_was(bundle: Any) -> None:
    chat = talking(load(bundle.folder, context=64, threads=1))
    conversation = Conversation(chat)
    ask(conversation, QUESTIONS[0])
    before = conversation.messages
    with pytest.raises(ContextOverflowError, match="context of 64"):
        conversation.ask("and then " * 30)
    assert conversation.messages == before
    conversation.reset()
    assert ask(conversation, QUESTIONS[1]).text


def test_refused(chat: Model, model: Model) -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        Conversation(model)
    with pytest.raises(EmptyPromptError):
        Conversation(chat).ask(" \n")
    user, assistant = ({"role": r, "content": "x"} for r in ("user", "assistant"))
    for messages, message in (
        ([user], "take turns"),
        ([assistant, user], "take turns"),
        ([user, assistant, {"role": "system", "content": "x"}], "take turns"),
        ([{"role": "robot", "content": "x"}], "'robot' of message 0"),
        ([{"role": "user"}], "message 0 does not have"),
        ([{"role": "user", "content": 3}], "message 0 does not have"),
    ):
        with pytest.raises(UsageError, match=message):
            Conversation(chat, messages)  # type: ignore[arg-type]
