"""Limits of the data and texts that a chat template makes, looked at where they are made: they cannot change later.

Python's recursion limit, which some libraries raise, guards neither the stack nor the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from markupsafe import Markup

MAX_DATA_DEPTH = 100  # of lists in lists; repr, JSON and comparisons take 0.2 KiB of C stack a level
MAX_DATA_SIZE = 8 * 1024 * 1024  # characters in data, and 8 for every item; what is in it twice counts twice
MAX_TEXT = 4 * 1024 * 1024  # characters that one operation may make
MAX_SEARCH = 1_000_000_000  # product of lengths, where Python's search takes so many steps: about a second

_LEAVES = {float, type(None), range}


class _Sum(list[Any]):
    """What ``+`` gave: many templates grow a list by one message at a time, and counting all of it takes long."""

    __slots__ = ("_size",)
    _size: int


_CONTAINERS = {list, dict, tuple, _Sum}  # by name, too: to look for a Collection takes a step


def check(value: Any) -> Any:
    """Return a value whose depth and size are within the limits.

    All that makes data calls it, so that nothing need be checked where data are used; they cannot change.

    Raises:
        SecurityError: It is too deep or too large.
    """
    _size(value)
    return value


def _size(value: Any) -> int:
    if isinstance(value, _Sum):
        return value._size
    size = 0
    level: dict[int, tuple[Any, int]] = {0: ((value,), 1)}
    for _ in range(MAX_DATA_DEPTH + 2):
        below: dict[int, tuple[Any, int]] = {}
        for holder, times in level.values():
            items: Iterable[Any] = holder
            if isinstance(holder, dict) or (type(holder) not in _CONTAINERS and isinstance(holder, Mapping)):
                items = chain(holder.keys(), holder.values())
            for item in items:
                size += 8 * times
                if isinstance(item, str):
                    size += times * len(item)
                elif isinstance(item, int):
                    size += times * (item.bit_length() // 3)
                elif type(item) in _CONTAINERS or (
                    type(item) not in _LEAVES and isinstance(item, Collection)
                ):
                    known = below.get(id(item))
                    below[id(item)] = (item, times + (known[1] if known else 0))
                if size > MAX_DATA_SIZE:
                    raise SecurityError("its data are too large")
        if not below:
            return size
        level = below
    raise SecurityError(f"its data are nested deeper than {MAX_DATA_DEPTH} levels")


def check_length(length: int) -> None:
    """Refuse to make a text of so many characters, if they are too many."""
    if length > MAX_TEXT:
        raise SecurityError(f"it makes a text of more than {MAX_TEXT} characters")


def add(left: Any, right: Any) -> Any:
    """Return ``left + right``."""
    if isinstance(left, str) and isinstance(right, str):
        check_length(len(left) + len(right))
        return left + right
    if isinstance(left, list) and isinstance(right, list):
        total = _Sum(left + right)
        total._size = _size(left) + _size(right)
        if total._size > MAX_DATA_SIZE:
            raise SecurityError("its data are too large")
        return total
    return check(left + right)


def check_search(text: str, sought: Any) -> None:
    """Refuse to look for one text in another if it takes the product of their lengths."""
    if isinstance(sought, str) and len(text) * len(sought) > MAX_SEARCH:
        raise SecurityError("it searches a long text in another")


def check_replace(text: str, old: str, new: str, count: int | None = None) -> None:
    """Refuse a ``str.replace`` that makes too long a text."""
    found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    check_length(len(text) + found * len(new) * (5 if isinstance(text, Markup) else 1))  # "&" becomes "&amp;"


def check_join(separator: str, items: Iterable[Any]) -> list[Any]:
    """Return the items of a ``str.join`` that does not make too long a text."""
    parts: list[Any] = check(list(items))
    check_length(len(separator) * len(parts) * (5 if isinstance(separator, Markup) else 1))
    return parts
