"""The Jinja environment of chat templates: what Hugging Face provides, less what could end or fill the process.

How deep a template is nested and what one operation may make is limited here and in ``template_data``; steps, time and
calls are in ``chat_template``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment, pass_eval_context

from .template_data import MAX_DATA_SIZE, add, check, check_join, check_length, check_replace, check_search

# Every level costs up to 2 KiB of C stack in jinja2's code generator and Python's compiler; real templates have 16.
MAX_NESTING = 64
MAX_REPEAT = 1_000_000  # length of a product such as '-' * 40
MAX_BITS = 65_536  # of a product of whole numbers
MAX_KEYS = 10_000  # of a dictionary from a list
ELIFS_A_LEVEL = 8  # an elif is a level in Python's compiler alone

# Not in templates: they pad or format to a given width, or make bytes, whose methods do.
_UNSAFE_METHODS: dict[str, type] = dict.fromkeys(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode"), str
) | {"to_bytes": int}
_UNSAFE_FILTERS = ("center", "format", "indent", "wordwrap", "urlize")
_SEARCHES = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"}
_HIDDEN_ARGUMENTS = {"_loop_vars", "_block_vars"}  # of jinja, which no template can reach


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Can hold itself, and data that hold it: as a text it would have no end."""

    def __repr__(self) -> str:
        raise SecurityError("a namespace is no text")


class _Parser(Parser):
    """Refuses deep nesting before it fills the memory with frames."""

    _depth = 0

    def parse_unary(self, with_filter: bool = True) -> nodes.Expr:
        self._depth += 1
        if self._depth > MAX_NESTING:
            self.fail("it is nested too deeply")
        node = super().parse_unary(with_filter)
        self._depth -= 1
        return node


class _CodeGenerator(CodeGenerator):
    """Puts a check around all that makes data or joins texts, and computes nothing itself."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._covered: set[int] = set()

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, (nodes.TemplateData, nodes.Const)):  # opening a template must run none of it
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _checked(self, node: Any, frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        parts = [
            part
            for item in node.items
            for part in ((item.key, item.value) if isinstance(item, nodes.Pair) else (item,))
        ]
        # What stands in a list that is checked needs no check, nor its place on the stack of Python's compiler.
        needless = id(node) in self._covered or all(isinstance(part, nodes.Const) for part in parts)
        self._covered.update(map(id, parts))
        self.write("" if needless else "environment.check(")
        visit(node, frame)
        self.write("" if needless else ")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(node, frame, super().visit_Dict)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        function = "str_join"
        if frame.eval_ctx.volatile:
            function = "(markup_join if context.eval_ctx.volatile else str_join)"
        elif frame.eval_ctx.autoescape:
            function = "markup_join"
        self.write(f"environment.joined({function}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no operation makes more than it may."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator
    check = staticmethod(check)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = _Parser(self, source, name, filename).parse()
        _check_nesting(template)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: D102
        kind = _UNSAFE_METHODS.get(attr)
        return not (kind and isinstance(obj, kind)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:  # noqa: D102
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed")
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: D102
        if operator == "+":
            return add(left, right)
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the operator {operator} is not allowed")
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > MAX_BITS:
                    raise SecurityError("a number is too large")
                return left * right
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and len(one) * int(other) > MAX_REPEAT:
                    raise SecurityError("a repeated text is too long")
        return check(super().call_binop(context, operator, left, right))

    @staticmethod
    def joined(join: Callable[[Any], str], parts: tuple[Any, ...]) -> str:
        """Return parts one after another, as ``~`` does."""
        check_length(sum(len(part) for part in parts if isinstance(part, str)))
        return join(parts)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Return the text of a macro, a block or ``{% set %}``."""
        pieces = list(pieces)
        check_length(sum(map(len, pieces)))
        return "".join(pieces)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", None)
        if isinstance(owner, str) and args:
            if name == "replace":
                check_replace(owner, *args)
            elif name == "join":
                args = (check_join(owner, args[0]),)
            elif name in _SEARCHES:
                check_search(owner, args[0])
        elif isinstance(__obj, type) or (
            isinstance(__obj, Macro) and __obj.catch_varargs | __obj.catch_kwargs
        ):
            check([args, [value for key, value in kwargs.items() if key not in _HIDDEN_ARGUMENTS]])
        return super().call(__context, __obj, *args, **kwargs)


def _check_nesting(template: nodes.Template) -> None:
    """Refuse what would exhaust the stack of a thread in the code generator or in Python's compiler."""
    left: list[tuple[nodes.Node, int]] = [(template, 0)]
    while left:
        node, depth = left.pop()
        if depth > MAX_NESTING:
            raise TemplateSyntaxError("it is nested too deeply", node.lineno)
        if isinstance(node, nodes.EvalContextModifier) and not isinstance(node.options[0].value, nodes.Const):
            raise TemplateSyntaxError(
                "autoescape takes a constant", node.lineno
            )  # which is all jinja computes
        below = depth + 1 + isinstance(node, nodes.Concat)  # two brackets in Python
        elifs = (
            {id(elif_): i // ELIFS_A_LEVEL for i, elif_ in enumerate(node.elif_)}
            if isinstance(node, nodes.If)
            else {}
        )
        left += [(child, below + elifs.get(id(child), 0)) for child in node.iter_child_nodes()]


def sandbox() -> Sandbox:
    """Return the environment, set up as Hugging Face sets up its own."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    for name in _UNSAFE_FILTERS:
        environment.filters.pop(name, None)
    bounded = environment.filters | _bounded_filters(dict(environment.filters))
    environment.filters.update({name: _checked(f) for name, f in bounded.items()})
    environment.globals.pop("lipsum", None)
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_dict
    )
    return environment


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose result is checked.

    Generators are run at once: a chain of them, each around the last, ends the process when it is freed.
    """

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if not isinstance(value, GeneratorType):
            return check(value)
        items, size = [], 0
        for item in value:
            items.append(item)
            size += len(item) if isinstance(item, str) else 0
            if size > MAX_DATA_SIZE:
                break
        return iter(check(items))

    return checked


def _bounded_filters(of_jinja: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return those filters that could take or make too much in one call."""

    @pass_eval_context
    def replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        check_replace(str(s), str(old), str(new), count)
        return of_jinja["replace"](context, s, old, new, count)

    @pass_eval_context
    def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        return of_jinja["join"](context, check_join(str(d), value), d, attribute)

    @pass_environment
    def sum(environment: Sandbox, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        for item in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
            start = add(start, item)  # that of Python would copy a list of lists at every step
        return start

    def trim(value: Any, chars: str | None = None) -> Any:
        check_search(str(value), chars)
        return of_jinja["trim"](value, chars)

    def batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
        if linecount > MAX_REPEAT:
            raise SecurityError("batches are too long")
        return of_jinja["batch"](value, linecount, fill_with)

    def round(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > 100:
            raise SecurityError("a precision is not from -100 to 100")
        return of_jinja["round"](value, precision, method)

    def int_(value: Any, default: Any = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > 1000:
            raise SecurityError("a number is too long")
        return of_jinja["int"](value, default, base)

    replaced = (replace, join, sum, trim, batch, round, tojson)
    return {"int": int_} | {f.__name__: f for f in replaced}


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's filter writes it."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise SecurityError("indent is not from 0 to 16")
    if separators is not None and len("".join(separators)) > 16:
        raise SecurityError("separators are too long")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise SecurityError("a format of time is too long")
    return datetime.now().strftime(format)


def _dict(source: Any = (), /, **named: Any) -> dict[Any, Any]:
    source = source if isinstance(source, Mapping) else list(source)
    if len(source) > MAX_KEYS:  # keys of one hash take time by their square, in one step
        raise SecurityError("a dictionary is too large")
    return check(dict(source, **named))  # type: ignore[no-any-return]
