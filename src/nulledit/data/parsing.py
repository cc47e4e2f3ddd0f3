"""Text of a facts file to its records: YAML, JSON, JSON lines or CSV, told apart by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from nulledit.data.facts import quote, suggest
from nulledit.data.formats import KNOWN_NAMES
from nulledit.data.sheets import has_header, parse_sheet
from nulledit.data.views import Row
from nulledit.errors import FactError
from nulledit.io.untrusted import check_values, json_problem, parse_yaml, unique_keys

LISTS = ("facts", "data", "records", "cases")
"""Keys under which a document may hold its list of records."""


@dataclass
class Parsed:
    """The records of a file."""

    container: str
    """json, jsonl, yaml or csv."""
    rows: list[Row]
    """In the file's order."""
    notices: tuple[str, ...] = ()
    """What was changed or not read in the container."""
    find_lines: Callable[[], list[int]] = field(default=list)
    """Line of each record, for containers that do not tell while they are read."""

    @cached_property
    def _lines(self) -> list[int]:
        return self.find_lines()

    def label(self, row: Row, derived: str = "") -> str:
        """Which record, from 1, on which line, with which id of its own or else derived."""
        line = row.line
        if line is None and row.number < len(self._lines):
            line = self._lines[row.number]
        told = [] if line is None else [f"line {line}"]
        told += [f"id {quote(name)}"] if (name := row.id or derived) else []
        return f"record {row.number + 1}" + (f" ({', '.join(told)})" if told else "")


def parse_text(text: str, *, source: str, suffix: str) -> Parsed:
    """The records of a text; `suffix` only decides what content leaves open."""
    if not text.strip():
        raise FactError(f"{source}: the file is empty")
    may_be_yaml = suffix in (".yaml", ".yml")
    check_values(text, source=source, error=FactError)
    if text.lstrip()[0] in "[{" and (_is_json(text) or not may_be_yaml):
        parsed = _parse_json(text, source)
    elif has_header(text) or suffix in (".csv", ".tsv"):
        parsed = Parsed("csv", *parse_sheet(text, source))
    else:
        document = parse_yaml(text, source=source, error=FactError)
        parsed = _parsed("yaml", document, source, lambda: _yaml_lines(text))
    if not parsed.rows:
        raise FactError(f"{source}: the file holds no facts")
    return parsed


def _parsed(
    container: str, document: Any, source: str, find_lines: Callable[[], list[int]]
) -> Parsed:
    if (table := _table(document)) is not None:
        return Parsed(container, [Row(i, record) for i, record in enumerate(table)])
    rows, notices = _rows(document, source)
    return Parsed(container, rows, notices, find_lines)


def _table(document: Any) -> list[dict[Any, Any]] | None:
    """Records of a table by columns, as pandas and datasets write them; None for all else.

    {"subject": {"0": ...}, ...}, {"subject": [...], ...}, {"columns": [...], "data": [[...], ...]}.
    """
    if not isinstance(document, dict):
        return None
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        whole = all(isinstance(row, list) and len(row) == len(names) for row in data)
        return [dict(zip(names, row, strict=True)) for row in data] if whole else None
    columns = list(document.values())
    if len(columns) < 2 or not KNOWN_NAMES & set(document):
        return None
    if all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns):
        return [{n: c[i] for n, c in document.items()} for i in columns[0]]
    if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return [dict(zip(document, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


def _rows(document: Any, source: str) -> tuple[list[Row], tuple[str, ...]]:
    """Records of a parsed YAML or JSON document, and what beside them was not read."""
    if document is None:
        raise FactError(f"{source}: the file holds no facts")
    records, notices = document, []
    if isinstance(document, dict):
        name = next((key for key in LISTS if isinstance(document.get(key), list)), None)
        others = [key for key in document if key != name]
        if name == "facts" and others:
            raise FactError(f"{source}: unknown key {quote(others[0])} beside 'facts'")
        if name:
            records = document[name]
            notices += [f"{source}: {quote(key)} beside {name!r} was not read" for key in others]
        elif "facts" in document:
            found = document["facts"]
            raise FactError(
                f"{source}: facts: expected a list of facts (found {type(found).__name__} "
                f"{quote(found)})"
            )
        elif len(document) > 1 and all(map(_is_list_of_records, document.values())):
            names = quote(", ".join(map(str, document)))
            raise FactError(f"{source}: holds several lists of records ({names}): give one alone")
        elif _is_by_id(document):
            records = [{"id": str(key), **record} for key, record in document.items()]
        elif len(document) > 1 or KNOWN_NAMES & set(document):
            records = [document]  # one fact alone
    if not isinstance(records, list):
        hint = suggest(next(iter(document), ""), ["facts"]) if isinstance(document, dict) else ""
        raise FactError(
            f"{source}: expected a list of facts or a mapping with the key 'facts' "
            f"(found {type(records).__name__} {quote(records)}){hint}"
        )
    return [Row(i, record) for i, record in enumerate(records)], tuple(notices)


def _is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_by_id(document: dict[Any, Any]) -> bool:
    """Whether a mapping holds records under their ids."""
    return not KNOWN_NAMES & set(document) and all(
        isinstance(value, dict) and KNOWN_NAMES & set(value) for value in document.values()
    )


# --- JSON -----------------------------------------------------------------------------------


def _parse_json(text: str, source: str) -> Parsed:
    try:
        return _parsed("json", _load_json(text), source, lambda: _json_lines(text))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return Parsed("jsonl", list(_parse_jsonl(text)))
        raise FactError(f"{source}: line {error.lineno}: broken JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise FactError(f"{source}: broken JSON: {json_problem(error)}") from None


def _is_json(text: str) -> bool:
    """Whether a text that may as well be YAML's flow style begins with a JSON value."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (RecursionError, ValueError):
        return False
    return True


def _parse_jsonl(text: str) -> Iterator[Row]:
    # Not splitlines(): U+2028 and the like may stand in a JSON text.
    lines = ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
    for number, (i, line) in enumerate(lines):
        try:
            yield Row(number, _load_json(line), i)
        except json.JSONDecodeError as error:
            yield Row(number, None, i, f"broken JSON: {error.msg}")
        except (RecursionError, ValueError) as error:
            yield Row(number, None, i, f"broken JSON: {json_problem(error)}")


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=unique_keys)


def _json_lines(text: str) -> list[int]:
    """Line of each record of a JSON text that was read without fault."""
    starts = list(_members(text, _skip(text, 0)))
    lines, line, at = [], 1, 0
    for start in starts:
        line += text.count("\n", at, start)
        at = start
        lines.append(line)
    return lines


def _members(text: str, at: int) -> Iterator[int]:
    """Where the records begin in the list, or in the mapping, that begins at `at`."""
    decoder = json.JSONDecoder()
    listed = text[at] == "["
    found = []
    at = _skip(text, at + 1)
    while text[at] not in "]}":
        name = None
        if not listed:
            name, at = decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # after the colon
        if name in LISTS and text[at] == "[":
            yield from _members(text, at)
            return
        found.append(at)
        at = _skip(text, decoder.raw_decode(text, at)[1])
        at = _skip(text, at + 1) if text[at] == "," else at
    yield from found


def _skip(text: str, at: int) -> int:
    """The next place that is no white space."""
    while text[at] in " \t\n\r":
        at += 1
    return at


# --- YAML -----------------------------------------------------------------------------------


def _yaml_lines(text: str) -> list[int]:
    """Line of each record of a YAML text that was read without fault."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    node: Any = yaml.compose(text, Loader=loader)
    if isinstance(node, yaml.MappingNode):
        under = {getattr(key, "value", None): value for key, value in node.value}
        lists = (under[name] for name in LISTS if isinstance(under.get(name), yaml.SequenceNode))
        node = next(lists, node)
    items = node.value if isinstance(node, yaml.SequenceNode) else [v for _, v in node.value]
    return [item.start_mark.line + 1 for item in items]
