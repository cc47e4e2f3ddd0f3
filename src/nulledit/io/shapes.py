"""What JSON from elsewhere must look like: types, put together, that pydantic compares it with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, cast

from nulledit.io.settings import CONFIG, Expected, problem
from nulledit.io.untrusted import is_number

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

MAX_DEPTH = 20
"""Of nested values; what nulledit writes has six."""
Finite = Annotated[Any, Expected("a number", is_number)]
Measured = Finite | None
"""A number; None is one that was not finite."""
Digits = Annotated[int, Expected("a number of digits", ge=0, le=20)]


def has(**kinds: Any) -> Any:
    """An object that has these names, each with a value of its kind; others are not looked at."""
    from typing_extensions import TypedDict  # before Python 3.12 pydantic takes no other

    return TypedDict("TypedDict", kinds)  # type: ignore[operator]


def left_out(kind: Any) -> Any:
    """What an object may lack."""
    return NotRequired[kind]


def list_of(kind: Any) -> Any:
    """A list."""
    return list[kind]


def named(kind: Any) -> Any:
    """An object of any names."""
    return dict[str, kind]


def or_none(kind: Any) -> Any:
    """None, too."""
    return kind | None


def that(kind: Any, words: str, test: Callable[[Any], bool] = lambda _: True) -> Any:
    """What passes a test; `words` say what is expected."""
    return Annotated[kind, Expected(words, test)]


def misfit(shape: Any, value: Any) -> str:
    """What is wrong with a value that is to have `shape`, in one line; empty where nothing is."""
    from pydantic import ValidationError

    if not is_shallow(value):
        return f"nested deeper than {MAX_DEPTH} levels"
    try:
        _adapter(shape).validate_python([value])
    except ValidationError as error:
        return problem(error, shape)
    return ""


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    """Of a list of it, as the adapter of a class takes no settings."""
    from pydantic import TypeAdapter

    return TypeAdapter(list[shape], config=cast("ConfigDict", CONFIG | {"extra": "allow"}))


def is_shallow(value: Any) -> bool:
    """Whether lists and objects are nested at most MAX_DEPTH deep."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level if _holds(v)]
        level, depth = [value for values in inner for value in values], depth + 1
    return not level


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list)
