"""What JSON from elsewhere must look like: checks of plain values, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nulledit.io.untrusted import is_number

MAX_DEPTH = 20
"""Of nested values; what nulledit writes has six."""


Check = Callable[[Any], bool]


def is_shallow(value: Any) -> bool:
    """Whether lists and objects are nested at most MAX_DEPTH deep."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level if _holds(v)]
        level, depth = [value for values in inner for value in values], depth + 1
    return not level


def has(**checks: Check) -> Check:
    """An object that has these names, each with a value that passes."""
    return lambda value: (
        isinstance(value, Mapping)
        and all(name in value and check(value[name]) for name, check in checks.items())
    )


def named(check: Check) -> Check:
    """An object of any names, each with a value that passes."""
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


def list_of(check: Check) -> Check:
    """A list of values that pass."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def or_none(check: Check) -> Check:
    """None, or a value that passes."""
    return lambda value: value is None or check(value)


def is_object(value: Any) -> bool:
    """Any object."""
    return isinstance(value, Mapping)


def is_digits(value: Any) -> bool:
    """A number of digits to show."""
    return is_whole(value) and value <= 20


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def is_text(value: Any) -> bool:
    """Text."""
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    """Yes or no."""
    return isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_measured(value: Any) -> bool:
    """A number; None is one that was not finite."""
    return value is None or is_number(value)
