"""Chat templates: what Hugging Face renders, and what a hostile one cannot do."""

import json
import shutil
import time
from pathlib import Path

import pytest

from flrc_runtime import FlrcError, FormatError, UsageError, chat_template
from flrc_runtime.chat_template import ChatTemplate
from flrc_runtime.tokenizer import Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
CHAT = [{"role": "user", "content": 'Hi <there> & "you"'}, {"role": "assistant", "content": "é"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
Be helpful<|im_end|>
' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ eos_token }}",
        "{%- set n = namespace(n=0) -%}{% for m in messages %}{% set n.n = n.n + 1 %}{{ n.n }}{% endfor %}",
        "{% for m in messages %}{{ m.content | trim | upper }}{{ '-' * 3 }}{% endfor %}",
        "{{ pad_token is defined }}",
        "{% generation %}{{ messages[1]['content'].strip().split(',')[0] }}{% endgeneration %}",
        "{{ messages | tojson(indent=2) }}{% if tools is not none %}tools{% endif %}",
        "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages[0].role) }}{{ strftime_now('%Y') }}",
        "{% macro say(x) %}{% if x is mapping %}{% for k, v in x.items() %}{{ k }}:{{ say(v) }},{% endfor %}"
        "{% else %}{{ x }}{% endif %}{% endmacro %}{{ say(" + "{'a': " * 20 + "1" + "}" * 20 + ") }}",
        "{% for x in " + "[" * 20 + "1" + "]" * 20 + " recursive %}{{ loop.depth }}"
        "{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% if x == 0 %}"
        + "".join(f"{{% elif messages|length == {i} %}}{i}" for i in range(30))
        + "{% endif %}",
        "{{ " + "[" * 60 + "1, 'a'" + "]" * 60 + " }}",
        "{% set n = namespace(l=[]) %}{% for m in messages %}{% set n.l = n.l + [m] %}{% endfor %}"
        "{{ n.l }}{{ n.l | tojson }}{{ n.l[1:] == n.l[:1] }}{{ [1, 2.5] | sum }}{{ (1, 2) + (3,) }}",
        "{% if messages | selectattr('role', 'equalto', 'x') %}any{% endif %}{{ dict(a=1) | items | list }}"
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | groupby('role') }}"
        "{{ 'a,b'.split(',') | batch(1) | list }}{{ 'a-b' | replace('-', '+') }}{{ 2.345 | round(1) }}",
        "{{ 'a' ~ 1 ~ none ~ 'b' + 'c' }}{{ ['a', 'b'] | join }}{{ '7' | int * 6 }}{{ ','.join(['a', 'b']) }}",
    ],
)
def test_the_same_as_hugging_face(source: str) -> None:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    for prompt in (True, False):
        expected, _ = rendering.render_jinja_template(
            [CHAT], chat_template=source, add_generation_prompt=prompt, **TOKENS
        )
        assert ChatTemplate(source, TOKENS).render(CHAT, add_generation_prompt=prompt) == expected[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(100001) %}a{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{{ messages | tojson(indent=1000000) }}",
    ],
)
def test_attacks_end_in_a_typed_error(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(FlrcError):
        print(repr(ChatTemplate(source, TOKENS).render(CHAT)[:200]))
    assert time.monotonic() - started < 10


def test_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that take long, one by one: far fewer than are allowed."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    slow = "{% for i in range(3000) %}{% set x = (range(90000) | list | sort | length) %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(FlrcError, match=r"takes more than 0\.2 seconds"):
        ChatTemplate(slow, TOKENS).render(CHAT)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "source",
    ["{{", "{% endfor %}", "{{ x | nothing }}", "{% include 'a' %}x" * 9000, "{{ 'a' | center(9) }}"],
)
def test_not_a_template(source: str) -> None:
    with pytest.raises(FormatError, match="chat template"):
        ChatTemplate(source, TOKENS)


@pytest.mark.parametrize("source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}"])
def test_no_other_file_is_read(source: str) -> None:
    with pytest.raises(FlrcError):
        ChatTemplate(source, TOKENS).render(CHAT)


def test_a_long_chat_is_no_attack() -> None:
    text = ChatTemplate(CHATML, TOKENS).render(CHAT * 1000)
    assert text.count("<|im_start|>") == 2002


def test_the_attr_filter_finds_nothing() -> None:
    assert ChatTemplate("{{ ''|attr('__class__') }}", TOKENS).render(CHAT) == ""


def test_a_template_refuses_messages() -> None:
    with pytest.raises(UsageError, match="refuses the messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENS).render(CHAT)


def test_no_second_bos(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "t")
    config = json.loads((STORIES / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    config["bos_token"] = {"content": "<s>", "special": True}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path / "t")
    ids = tokenizer.encode_chat([{"role": "user", "content": "Once upon"}])
    assert ids.count(1) == 1 and ids[0] == 1
    assert tokenizer.encode("Once upon").count(1) == 1


def test_the_jinja_file_comes_first(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("from the file")
    template = Tokenizer.from_folder(tmp_path / "t").template
    assert template is not None and template.render(CHAT) == "from the file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", b"a" * 70_000),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(STORIES, tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(content)
    with pytest.raises(FormatError):
        Tokenizer.from_folder(tmp_path / "t")
