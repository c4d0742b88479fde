"""``chat_frames.json``: what a chat template puts between the words of a conversation, for readers without Jinja.

A template is asked for a few conversations whose contents are marks, and what stands between the marks is kept. It is
kept only if the same pieces then give what the template gives for other conversations, word for word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flrc_runtime.chat_template import ChatTemplate, Message
from flrc_runtime.errors import FlrcError
from flrc_runtime.files import write_json

FILE_NAME = "chat_frames.json"
_MARKS = tuple(f"⟦{word} of the frame⟧" for word in ("first", "second", "third"))
# Contents that a template could treat in a way of its own.
_CONTENTS = (
    "Why is the sky blue?",
    " two spaces around ",
    "\n\nlines\nand\ttabs\n",
    "{{ braces }} <b>&amp;</b> \\n <|im_end|> </s> <end_of_turn>",
    "日本語 👩‍👩‍👧",
    "x",
    "a longer text. " * 40,
)


@dataclass(frozen=True)
class ChatFrames:
    """The pieces of a conversation that are not its words.

    Args:
        start: Before the first user's words, where no system message comes first.
        user_to_answer: After the last user's words; the answer follows.
        user_to_assistant: Between a user's words and the assistant's.
        assistant_to_user: Between the assistant's words and the next user's.
        start_system: Before a system message; None if the template takes none.
        system_to_user: Between it and the first user's words.
        trim: Whether spaces around all words are left out.
    """

    start: str
    user_to_answer: str
    user_to_assistant: str
    assistant_to_user: str
    start_system: str | None
    system_to_user: str | None
    trim: bool

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a conversation: perhaps a system message, then user and assistant in turn."""
        joints = {
            ("", "user"): self.start,
            ("", "system"): self.start_system,
            ("system", "user"): self.system_to_user,
            ("user", "assistant"): self.user_to_assistant,
            ("assistant", "user"): self.assistant_to_user,
        }
        text, before = "", ""
        for message in messages:
            joint = joints.get((before, message["role"]))
            if joint is None:
                raise ValueError(f"a {message['role']} message cannot follow {before or 'the beginning'}")
            text += joint + (message["content"].strip() if self.trim else message["content"])
            before = message["role"]
        return text + self.user_to_answer


def write_frames(folder: Path, template: ChatTemplate | None) -> bool:
    """Write ``chat_frames.json`` if the template can be said in frames; return whether it was."""
    frames = None if template is None else chat_frames(template)
    if frames is not None:
        write_json(folder / FILE_NAME, asdict(frames))
    return frames is not None


def chat_frames(template: ChatTemplate) -> ChatFrames | None:
    """Return the frames of a template, or None if it does more than put something between the words."""
    if template.uses_date:  # it says something else tomorrow
        return None
    first, second, third = _MARKS
    try:
        alone = _between(template.render(_turns(first)), first)
        turns = _between(template.render(_turns(first, second, third)), first, second, third)
        if alone is None or turns is None or (alone[0], alone[1]) != (turns[0], turns[3]):
            return None
        trim = f" {first} " not in template.render(_turns(f" {first} "))
        start_system, system_to_user = _system(template) or (None, None)
        frames = ChatFrames(alone[0], alone[1], turns[1], turns[2], start_system, system_to_user, trim)
        return frames if _is_said(template, frames) else None
    except FlrcError:
        return None


def _system(template: ChatTemplate) -> tuple[str, str] | None:
    """Return what stands before a system message and behind it; None if the template refuses one."""
    first, second, _ = _MARKS
    try:
        found = _between(template.render([_message("system", first), *_turns(second)]), first, second)
    except FlrcError:
        return None
    return None if found is None else (found[0], found[1])


def _is_said(template: ChatTemplate, frames: ChatFrames) -> bool:
    """Compare frames and template on conversations of one to seven turns, with and without a system message."""
    for shift in range(len(_CONTENTS)):
        words = _CONTENTS[shift:] + _CONTENTS[:shift]
        for count in (1, 3, 7):
            turns = _turns(*words[:count])
            asked = [turns]
            if frames.start_system is not None:
                asked.append([_message("system", words[-1]), *turns])
            if any(frames.render(messages) != template.render(messages) for messages in asked):
                return False
    return True


def _between(text: str, *marks: str) -> list[str] | None:
    """Return the pieces before, between and behind the marks; None unless each is there once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _turns(*contents: str) -> list[Message]:
    return [_message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
