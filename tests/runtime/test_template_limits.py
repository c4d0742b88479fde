"""What could end or fill the process from inside a chat template: under a raised recursion limit, on a small stack."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUNTIME = Path(__file__).parents[2] / "runtime"
# Each in turn, with its error, its seconds and what the process has taken by then; a crash ends the process.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from flrc_runtime import FlrcError
from flrc_runtime.chat_template import ChatTemplate

def peak():  # MiB; what resource says is that of the process which began this one, if it was larger
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)

def attack():
    for name, source in json.load(sys.stdin).items():
        print(json.dumps(name), end="", file=sys.stderr)
        begun = time.monotonic()
        try:
            found = "no error: " + ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])[:80]
        except FlrcError as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([name, found, time.monotonic() - begun, peak()]), flush=True)

sys.setrecursionlimit(100_000)  # as libraries do that walk deep trees
if sys.argv[1] == "raised":
    attack()
else:
    threading.stack_size(256 * 1024)
    thread = threading.Thread(target=attack)
    thread.start()
    thread.join()
"""
LONG = 15_000  # far more than a small stack would hold


def repeated(before: str, piece: str, middle: str = "1", after: str = "", end: str = "") -> str:
    times = LONG // len(piece + after)
    return before + piece * times + middle + after * times + end


def grown(piece: str, then: str, times: int = 20_000) -> str:
    """Put a namespace's data into themselves, so many times."""
    return (
        "{% set ns = namespace(x=['a']) %}{% for i in range(" + str(times) + ") %}"
        "{% set ns.x = " + piece + " %}{% endfor %}" + then
    )


OPENING = (
    {
        f"prefix {piece}": repeated("{{ ", piece, end=" }}")
        for piece in ("not ", "- ", "x if y else ", "x(", "x ~ (", "[", "(", "{1:", "x|d(", "x is in ")
    }
    | {
        f"suffix {piece}": repeated("{{ x", piece, "", end=" }}")
        for piece in (" + x", " * x", " and x", " or x", ".y", "[1]", "[1:]", "|d", "()", " is none")
    }
    | {
        f"nested {before}": repeated("{{ ", before, "1", after, end=" }}")
        for before, after in (
            ("(", ")"),
            ("[", "]"),
            ("[x, ", "]"),
            ("{1:", "}"),
            ("x(", ")"),
            ("x ~ (", ")"),
        )
    }
    | {
        f"nested {tag}": repeated("", f"{{% {tag} %}}", "a", f"{{% end{tag.split()[0]} %}}")
        for tag in ("if x", "for x in y", "filter upper", "macro x()", "call x()", "with x=1")
    }
    | {
        "elif": repeated("{% if x %}", "{% elif x %}", end="{% endif %}"),
        "a long number": "{{ " + "1" * LONG + " }}",
        "computed in opening": "{% autoescape 'ab'|replace('', 'c') %}{% endautoescape %}",
    }
)
SAY = "{{ ns.x }}{{ ns.x|tojson }}{{ ns.x == [ns.x] }}{{ [ns.x, ns.x]|sort }}{{ ns.x ~ 1 }}"
TWICE = "{% set ns = namespace(s='a&') %}{% macro say(x) %}{{ x }}{{ x }}{% endmacro %}"
RENDERING = (
    {
        "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "two macros": "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}",
        "caller": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
        "block": "{% block a %}{{ self.a() }}{% endblock %}",
        "loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "macro with the deepest data": grown("[ns.x]", "", 95)
        + "{% macro f(n) %}{{ f(n - 1) if n else [ns.x|tojson, ns.x|string, f(1)] }}{% endmacro %}{{ f(40) }}",
        # Jinja swallows errors of len() in this test.
        "swallowed": "{% for x in range(999) %}{% for y in range(999) %}" + "{{ loop is sequence }}" * 3
        + "{% endfor %}{% endfor %}",
        "straight": "{% set a = 1 %}" + ("{% set a = " + "[" * 50 + "a" + "]" * 50 + " %}") * 60 + "{{ a }}",
        "varargs": "{% set ns = namespace(x=()) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
        "{% for i in range(20000) %}{{ f(ns.x) }}{% endfor %}{{ ns.x }}",
        "kwargs": "{% set ns = namespace(x=()) %}{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}"
        "{% for i in range(20000) %}{{ f(_a=ns.x) }}{% endfor %}{{ ns.x }}",
        "kwargs that jinja knows": "{% set ns = namespace(x=()) %}{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}"
        "{% for i in range(20000) %}{{ f(caller=ns.x) }}{% endfor %}{{ ns.x }}",
        "loops over loops": "{% set ns = namespace(x=[1]) %}{% for i in range(20000) %}"
        "{% for a in ns.x if true %}{% set ns.x = loop %}{% break %}{% endfor %}{% endfor %}{{ ns.x|list }}",
        "a namespace of itself": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
        "wide text": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
        "wide comparison": "{% set a, b = [1], [1] %}" + "{% set a, b = [a, a], [b, b] %}" * 60 + "{{ a == b }}",
        "grown list": "{% set a = ['a'] %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    }
    | {
        f"data {piece}": grown(piece, SAY)
        for piece in (
            "[ns.x]", "(ns.x,)", "{'a': ns.x}", "dict(a=ns.x)", "[ns.x]|batch(1)|list", "[[1, ns.x]]|groupby(0)",
            "cycler(ns.x).items", "{'a': ns.x}.keys().mapping", "{'a': ns.x}.items()", "{'a': ns.x}|dictsort",
            "[] + [ns.x]", "[ns.x] * 1", "ns.x|map('string')", "ns.x|slice(1)",
        )
    }
    | {
        f"size {piece}": TWICE + "{% for i in range(40) %}{% set ns.s = " + piece + " %}{% endfor %}{{ ns.s }}"
        for piece in (
            "ns.s ~ ns.s", "ns.s + ns.s", "[ns.s, ns.s]|join", "''.join([ns.s, ns.s])", "[1, 1, 1]|join(ns.s)",
            "ns.s|replace('a', 'aa')", "ns.s.replace('a', 'aa')", "say(ns.s)", "[ns.s, ns.s]|string",
            "[ns.s, ns.s]|sum(start='')", "('&&'|safe).join([ns.s, ns.s])", "(ns.s ~ '\"')|tojson|tojson",
        )
    }
    | {
        f"call {call}": "{% set a = 'a' * 1000000 %}{{ (" + call + ")|string|length }}"
        for call in (
            "([a] * 100000)|join", "([a] * 1000000)|tojson", "([1] * 100000)|join(a)", "a|replace('', a)",
            "range(99999)|map('replace', '', a)|list", "range(9)|list|tojson(separators=(a, a))",
            "'a'.encode().center(9 * 1000000000)", "(1).to_bytes(9 * 1000000000, 'big')", "a.translate({97: a})",
            "dict.fromkeys(range(99999), a)", "[1]|batch(9 * 1000000000, 1)|list", "5|round(-1000000000)",
            "5|round(1000000000, 'floor')", "(a ~ a ~ a).rfind('ab' ~ a[1:])", "a.strip('b' * 1000000 ~ 'a')",
            "a|trim('b' * 1000000 ~ 'a')", "('f' * 1000000)|int(0, 16)", "strftime_now('%Y' * 400000)",
            "dict((range(99999)|list)|batch(2))",
        )
    }
)  # fmt: skip


@pytest.mark.parametrize("stack", ["raised", "small"])
@pytest.mark.parametrize("kind", ["opening", "rendering"])
def test_no_template_ends_or_fills_the_process(stack: str, kind: str) -> None:
    attacks = OPENING if kind == "opening" else RENDERING
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, stack],
        input=json.dumps(attacks),
        env={"PYTHONPATH": str(RUNTIME)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    results: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-300:]
    assert [name for name, *_ in results] == list(attacks)
    expected = "FormatError: " if kind == "opening" else ("FlrcError: ", "UsageError: ")
    assert [r for r in results if not r[1].startswith(expected) or r[2] > 20 or r[3] > 400] == []
