"""Chat templates as frames: those of the supported families, and templates that frames cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flrc_exporters.chat_frames import ChatFrames, chat_frames, write_frames
from flrc_runtime.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] | trim + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NOT_FRAMES = {
    "upper case": "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}",
    "a number for each turn": "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "the last turn only": "{{ messages[-1]['content'] }}",
    "words twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "a length": "{% for m in messages %}<{{ m.content | length }}>{{ m.content }}{% endfor %}",
    "words that are escaped": "{% for m in messages %}{{ m.content | replace('<', '&lt;') }}|{% endfor %}",
    "another end later": "{% for m in messages %}{{ m.content }}{{ '!' if loop.index > 5 else '?' }}{% endfor %}",
    "the date": "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "it refuses": "{{ raise_exception('never') }}",
}


@pytest.mark.parametrize("source", [SMOLLM2, GEMMA3, LLAMA2], ids=["smollm2", "gemma3", "llama2"])
def test_frames_say_what_the_template_says(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    frames = chat_frames(template)
    assert frames is not None
    assert frames.trim == (source is GEMMA3)
    assert (frames.start_system is None) == (source is LLAMA2)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f" words {i}\n"} for i in range(5)]
    assert frames.render(turns) == template.render(turns)
    if frames.start_system is not None:
        turns = [{"role": "system", "content": " be brief "}, *turns]
        assert frames.render(turns) == template.render(turns)


def test_a_default_system_message_is_part_of_the_start() -> None:
    frames = chat_frames(ChatTemplate(SMOLLM2, TOKENS))
    assert frames == ChatFrames(
        start="<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n",
        user_to_answer="<|im_end|>\n<|im_start|>assistant\n",
        user_to_assistant="<|im_end|>\n<|im_start|>assistant\n",
        assistant_to_user="<|im_end|>\n<|im_start|>user\n",
        start_system="<|im_start|>system\n",
        system_to_user="<|im_end|>\n<|im_start|>user\n",
        trim=False,
    )


@pytest.mark.parametrize("kind", NOT_FRAMES)
def test_what_frames_cannot_say_has_none(kind: str, tmp_path: Path) -> None:
    template = ChatTemplate(NOT_FRAMES[kind], TOKENS)
    assert chat_frames(template) is None
    assert not write_frames(tmp_path, template)
    assert list(tmp_path.iterdir()) == []


def test_the_file_holds_the_frames(tmp_path: Path) -> None:
    assert write_frames(tmp_path, ChatTemplate(GEMMA3, TOKENS))
    found = json.loads((tmp_path / "chat_frames.json").read_text("utf-8"))
    assert ChatFrames(**found) == chat_frames(ChatTemplate(GEMMA3, TOKENS))
    assert not write_frames(tmp_path, None)


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "assistant"], ["tool"]]
)
def test_other_conversations_are_refused(roles: list[str]) -> None:
    frames = chat_frames(ChatTemplate(SMOLLM2, TOKENS))
    assert frames is not None
    with pytest.raises(ValueError, match="cannot follow"):
        frames.render([{"role": role, "content": "x"} for role in roles])
