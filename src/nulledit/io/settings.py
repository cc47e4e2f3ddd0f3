"""Settings: frozen dataclasses that pydantic checks, and what is wrong with them in one line.

pydantic is imported with the first value to check: commands that read only a ledger need none.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self, TypeVar

from nulledit.errors import ConfigError
from nulledit.io.untrusted import MAX_SETTINGS, is_number, one_line, parse_yaml, read_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
CONFIG: dict[str, Any] = {
    "strict": True,
    "extra": "forbid",
    "allow_inf_nan": False,
    "validate_default": True,
}


EXPONENT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")


class Expected:
    """What a field's value must be, as `Annotated[float, Expected("a number above 0", gt=0)]`."""

    def __init__(self, words: str = "", test: Callable[[Any], Any] = lambda _: True, **bounds: Any):
        """`bounds` are pydantic's; of lists and mappings pydantic says which part is wrong."""
        self.words, self.test, self.bounds = words, test, bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """pydantic's schema of the field, with these bounds, test and words."""
        from pydantic_core import core_schema

        schema = handler(source) | self.bounds
        kind = schema["type"]
        if kind == "float":
            schema = core_schema.no_info_before_validator_function(from_yaml, schema)
        elif kind == "tuple":
            schema["strict"] = False
        schema = core_schema.no_info_after_validator_function(self._tested, schema)
        if kind not in ("any", "float", "int", "str", "union"):
            return schema
        return core_schema.custom_error_schema(schema, "expected", custom_error_message=self.words)

    def _tested(self, value: Any) -> Any:
        from pydantic_core import PydanticCustomError

        if not self.test(value):
            raise PydanticCustomError("expected", self.words)
        return value


def from_yaml(value: Any) -> Any:
    """A value as it is meant: YAML 1.1 reads 2e-2 as text, and has lists where we have tuples.

    Any other number that is text was written so, in quotes, and is none.
    """
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        return typed(value)
    return tuple(value) if isinstance(value, list) else value


def typed(text: str) -> float | str:
    """The number that someone typed where only a number can be; the text itself if it is none."""
    with contextlib.suppress(ValueError):
        return float(text)
    return text


Number = Annotated[float, Expected("a number")]
Positive = Annotated[float, Expected("a number above 0", gt=0)]
NotNegative = Annotated[float, Expected("a number, 0 or more", ge=0)]
Share = Annotated[float, Expected("a share above 0, at most 1", gt=0, le=1)]
Whole = Annotated[int, Expected("a whole number from 0, below 2^63", ge=0, lt=2**63)]
Count = Annotated[int, Expected("a whole number from 1, below 2^63", ge=1, lt=2**63)]
Several = Annotated[tuple[T, ...], Expected()]
OneSlot = Annotated[str, Expected("a text with exactly one {}", lambda text: text.count("{}") == 1)]


def checked(cls: type[T]) -> type[T]:
    """Make a frozen dataclass refuse what its fields can't hold, and unknown names: ConfigError.

    Its types decide what it holds: True is no number, "5" is none, nan and infinity are refused.
    Where a field is another checked dataclass, named values become one.
    """
    as_typed: Any = cls.__init__

    @functools.wraps(as_typed)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        from pydantic_core import ArgsKwargs

        _validate(cls, ArgsKwargs(args, given), "", self_instance=self)

    _configured(cls).__init__ = __init__
    return cls


def _configured(cls: Any) -> Any:
    """Tell pydantic how to check the dataclass."""

    def schema_of(_: type, source: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(source) | {"strict": False}  # else only an object of the class would do

    cls.__get_pydantic_core_schema__ = classmethod(schema_of)
    cls.__pydantic_config__ = CONFIG
    return cls


def read_settings(cls: type[T], data: Any, where: str = "") -> T:
    """Settings from plain data; unknown names and values that can't be are ConfigErrors.

    `where` stands before the names in messages: "method.".
    """
    return _validate(cls, dict(data) if isinstance(data, Mapping) else data, where)


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of settings as a file holds them."""
    return _adapter(cls).json_schema()


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """What checks values of the type `cls`, made once."""
    from pydantic import ConfigDict, TypeAdapter

    if not isinstance(cls, type):
        return TypeAdapter(cls, config=typing.cast(ConfigDict, CONFIG))
    if not hasattr(cls, "__pydantic_config__"):
        _configured(cls)  # a plain dataclass, as another package's may be
    return TypeAdapter(cls)


def _validate(cls: Any, data: Any, where: str, **how: Any) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(cls).validator.validate_python(data, **how)
    except ValidationError as error:
        raise ConfigError(problem(error, cls, where)) from None


def problem(error: ValidationError, cls: Any, where: str = "") -> str:
    """The first thing that is wrong: the field, what was found and what was expected."""
    found = error.errors(include_url=False)[0]
    kind, place = found["type"], found["loc"]
    name = where + ".".join(part for part in place if isinstance(part, str))  # without indices
    if kind == "invalid_key":
        return unknown(f"{name}.{shown(place[-1])}".removeprefix("."), _names(cls, place[:-1]))
    if kind == "unexpected_keyword_argument":
        return unknown(name, _names(cls, place[:-1]))
    name = one_line(name, 100) or where.removesuffix(".") or "what is given"
    if kind == "missing":
        return f"{name} is missing"
    words = _WORDS.get(kind, found["msg"].removeprefix("Input should be "))
    if kind == "literal_error":
        words += found["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    return f"{name} is {shown(found['input'])}; expected {words}"


_WORDS = {
    "bool_type": "true or false",
    "dataclass_type": "named settings",
    "dict_type": "named values",
    "finite_number": "a number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "literal_error": "one of ",
    "mapping_type": "named values",
    "string_type": "text",
    "tuple_type": "a list",
}
"""What pydantic's kinds of errors expected, in words; for others it says so itself."""


def _names(cls: Any, path: Iterable[int | str]) -> list[str]:
    """The settings that there are at `path` in `cls`."""
    for part in path:
        kind = typing.get_type_hints(cls).get(str(part), cls)
        cls = next((k for k in (kind, *typing.get_args(kind)) if is_dataclass(k)), cls)
    return [field.name for field in fields(cls)]


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a setting that is none of `known`."""
    near = difflib.get_close_matches(name.split(".")[-1], known := list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return one_line(f"unknown setting {name!r}; {hint}")


def shown(value: object) -> str:
    """A value for a message: short, also where it has more digits than Python writes."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"
    return one_line(repr(value), 60)


# --- Files ----------------------------------------------------------------------------------


class FromFile(Protocol):
    """Settings that a YAML file holds."""

    kind: ClassVar[str]
    """What they are, in words."""
    folder: ClassVar[str]
    """Of those that come with the package, in its assets."""

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From plain data; ConfigError otherwise."""


F = TypeVar("F", bound=FromFile)


def shipped(cls: type[FromFile]) -> list[str]:
    """Names of the settings of this kind inside the package."""
    files = (resources.files("nulledit") / "assets" / cls.folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_settings(cls: type[F], name_or_path: str | Path) -> F:
    """Settings by YAML file, or by the name of one that comes with the package."""
    path = Path(name_or_path)
    if (name := str(name_or_path)) in shipped(cls):
        file = resources.files("nulledit") / "assets" / cls.folder / f"{name}.yaml"
        text = file.read_text(encoding="utf-8")
    elif os.path.exists(path):  # also where the name is too long to ask
        text = read_text(path, most=MAX_SETTINGS, error=ConfigError, what=cls.kind)
    else:
        names = ", ".join(shipped(cls))
        raise ConfigError(f"no {cls.kind} {name!r}: expected a YAML file, or {names}")
    data = parse_yaml(text, source=str(path), error=ConfigError)
    try:
        return cls.from_dict(data)
    except ConfigError as error:
        raise ConfigError(one_line(f"{path}: {error}")) from error


def parse_changes(settings: Iterable[str], option: str = "--set ") -> dict[str, Any]:
    """`values.steps=15` entries as {"values.steps": "15"}.

    `option`: what they were given by, for messages.
    """
    changes = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option}{setting!r}: expected FIELD=VALUE such as values.steps=15")
        changes[name.strip()] = value.strip()
    return changes


def check_whole(name: str, value: object, *, least: int = 0) -> None:
    """ConfigError unless `value` is a whole number from `least` that ledgers can hold."""
    if not (is_number(value) and isinstance(value, int) and value >= least):
        raise ConfigError(
            f"{name} is {shown(value)}; expected a whole number from {least}, below 2^63"
        )
