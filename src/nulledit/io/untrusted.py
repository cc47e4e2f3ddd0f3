"""Files from elsewhere: bounded before they are read, refused in one line, never run as code.

Text, JSON and YAML. Every function takes the error to raise, so that the message comes as the kind
that the caller's users know.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import yaml

from nulledit.errors import NullEditError

if TYPE_CHECKING:
    from yaml import SafeLoader as BaseLoader
else:  # ten times faster, where PyYAML was built with libyaml
    BaseLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_SETTINGS = 2**20
"""Bytes of a recipe, a scale or a gate: the longest shipped one has a few thousand."""
MAX_DOCUMENT = 64 * 2**20
"""Bytes of one JSON document about a run or a study; a summary of 100 calls has less than one."""
MAX_LINES = 2**30
"""Bytes of results by line: 100,000 facts of 10 kB each, generated texts included."""
MAX_VALUES = 20_000_000
"""Values of a JSON or CSV text. Each takes some 100 bytes once parsed, so about 2 GB."""
MAX_YAML_NODES = 2_000_000
"""Scalars, lists and mappings of a YAML text: PyYAML holds some 700 bytes for each, and takes 10 s
for as many. The 21,919 cases of CounterFact are 1.3 million."""
MAX_YAML_DEPTH = 20
"""libyaml's composer recurses in C: deep nesting would end the process."""
MAX_YAML_NUMBER = 100
"""Characters. YAML 1.1 reads 1:1:1... to the base of 60, in quadratic time."""
MAX_MESSAGE = 600
"""Characters of a message that quotes a file."""

_YAML_TAGS = ("!", "tag:yaml.org,2002:str")  # both only say: this is text
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 60


def read_text(file: Path, *, most: int, error: type[NullEditError], what: str = "file") -> str:
    """The UTF-8 text of a regular file of at most `most` bytes, without a byte order mark.

    Folders, devices and named pipes are refused unread: /dev/zero never ends.
    """
    try:
        if not os.path.exists(file):
            raise error(f"{file}: no such file")
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise error(f"{file}: is {kind}: expected a {what}")
        if (size := found.st_size) > most:
            raise error(f"{file}: has {size} bytes: expected at most {most}")
        with file.open("rb") as opened:
            raw = opened.read(size + 1)
        if len(raw) > size:
            raise error(f"{file}: grew while it was read: try again")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        byte = broken.object[broken.start]
        raise error(
            f"{file}: not UTF-8 text (found byte 0x{byte:02X} at offset {broken.start})"
        ) from None
    except OSError as broken:
        raise error(f"{file}: cannot be read: {broken.strerror}") from None
    except ValueError:  # a path with a NUL
        raise error(f"{str(file)!r}: no such file") from None


def check_values(text: str, *, source: str, error: type[NullEditError]) -> None:
    """Refuse a JSON or CSV text that may hold more than MAX_VALUES values, without parsing it."""
    if (found := max(sum(map(text.count, ",[{")), text.count("\n"))) > MAX_VALUES:
        raise error(f"{source}: holds up to {found} values: expected at most {MAX_VALUES}")


# --- JSON -----------------------------------------------------------------------------------


def parse_json(text: str, *, source: str, error: type[NullEditError]) -> Any:
    """The value of a JSON text: no key twice, no NaN or Infinity, which JSON does not have."""
    check_values(text, source=source, error=error)
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (RecursionError, ValueError) as broken:
        raise error(f"{source}: not JSON ({json_problem(broken)})") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key given twice is a ValueError, where JSON would silently take the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {_quote(name)} stands twice in one object, {_quote(found)}")
        found[name] = value
    return found


def json_problem(broken: Exception) -> str:
    """What a parser of JSON complained of, in a few words."""
    if isinstance(broken, RecursionError):
        return "it is nested too deeply"
    if isinstance(broken, json.JSONDecodeError):
        return f"{broken.msg} in line {broken.lineno}"
    return str(broken)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


# --- YAML -----------------------------------------------------------------------------------


class _Loader(BaseLoader):
    """Plain values only, no key twice in a mapping, no number without an end."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As YAML says, which PyYAML does not check."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {_quote(key.value)} stands twice in one mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer of at most MAX_YAML_NUMBER characters."""
        return super().construct_yaml_int(_short_number(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number of at most MAX_YAML_NUMBER characters."""
        return super().construct_yaml_float(_short_number(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _short_number(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > MAX_YAML_NUMBER:
        problem = f"a number of {len(node.value)} characters: write a text in quotes"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return node


def parse_yaml(text: str, *, source: str, error: type[NullEditError]) -> Any:
    """The value of a YAML text: plain values, without tags, aliases and keys given twice."""
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise error(
            f"{source}: line {line}: not a text file: "
            f"it holds the character U+{ord(found.group()):04X}"
        )
    try:
        _refuse_traps(text)
        # A loader of our own that is a SafeLoader: it builds plain values only.
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as broken:
        mark = broken.problem_mark or broken.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = " ".join(str(broken.problem or broken.context).split())
        raise error(one_line(f"{source}: {where}broken YAML: {problem}")) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as broken:
        # ValueError: a date such as 2021-13-45, or a number such as 0x_.
        raise error(one_line(f"{source}: broken YAML: {broken}")) from None


def _refuse_traps(text: str) -> None:
    """Refuse, by events, which are safe to read, what is not safe to build.

    Aliases can make a small file huge, deep nesting overflows the stack, and PyYAML fails with
    any kind of error on a text tagged as, say, a timestamp.
    """
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        problem, tag = None, getattr(event, "tag", None)
        mark = cast(Any, event.start_mark)  # libyaml has a Mark of its own
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not allowed"
        elif tag not in (None, *_YAML_TAGS):
            problem = f"tags are not allowed (found {_quote(tag)})"
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            problem = f"nested deeper than {MAX_YAML_DEPTH} levels"
        if nodes > MAX_YAML_NODES:
            problem = f"more than {MAX_YAML_NODES} values: write so many as JSON"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


# --- Numbers and messages -------------------------------------------------------------------


def is_number(value: object) -> bool:
    """Whether a parsed value is a finite number; True and False are none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # more is no measurement
    return isinstance(value, float) and math.isfinite(value)


def one_line(message: object, most: int = MAX_MESSAGE) -> str:
    """A message on one line, its middle left out where it has more than `most` characters."""
    text = " ".join(str(message).split())
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def _quote(value: object) -> str:
    return _shortener.repr(value).replace("\n", " ")
