"""Text of a facts file to its records: YAML, JSON, JSON lines or CSV, told apart by content."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nulledit.data.facts import FIELDS, REQUIRED, quote, suggest
from nulledit.errors import FactError
from nulledit.reading import check_values, parse_yaml, unique_keys

LIST_SEPARATOR = " | "
ANSWER_SEPARATOR = " => "
_CSV_PROBES = ("neighbours", "portability")
_CSV_LISTS = ("more_prompts", "paraphrases", *_CSV_PROBES)


@dataclass(frozen=True)
class Row:
    """A record and where it stood."""

    number: int
    """Place among the file's records, from 0."""
    record: Any
    """What was found there, unchecked."""
    line: int | None = None
    """Line of the file it ends on, from 1, where the container tells."""

    @property
    def label(self) -> str:
        """For messages."""
        line = "" if self.line is None else f" (line {self.line})"
        return f"record {self.number}{line}"


def parse_text(text: str, *, source: str, suffix: str) -> tuple[str, list[Row]]:
    """Name of the container and its records; `suffix` only decides what content leaves open."""
    if not text.strip():
        raise FactError(f"{source}: the file is empty")
    may_be_yaml = suffix in (".yaml", ".yml")
    check_values(text, source=source, error=FactError)
    if text.lstrip()[0] in "[{" and (_is_json(text) or not may_be_yaml):
        container, rows = _parse_json(text, source)
    elif _has_csv_header(text) or suffix == ".csv":
        container, rows = "csv", list(_parse_csv(text, source))
    else:
        document = parse_yaml(text, source=source, error=FactError)
        container, rows = "yaml", _rows(document, source)
    if not rows:
        raise FactError(f"{source}: the file holds no facts")
    return container, rows


def _rows(document: Any, source: str) -> list[Row]:
    """Records of a parsed YAML or JSON document."""
    if document is None:
        raise FactError(f"{source}: the file holds no facts")
    if isinstance(document, dict) and "facts" in document:
        if others := [name for name in document if name != "facts"]:
            raise FactError(f"{source}: unknown key {quote(others[0])} beside 'facts'")
        document = document["facts"]
    elif isinstance(document, dict) and len(document) > 1:
        document = [document]  # one fact alone
    if not isinstance(document, list):
        hint = suggest(next(iter(document), ""), ["facts"]) if isinstance(document, dict) else ""
        raise FactError(
            f"{source}: expected a list of facts or a mapping with the key 'facts' "
            f"(found {type(document).__name__} {quote(document)}){hint}"
        )
    return [Row(i, record) for i, record in enumerate(document)]


# --- JSON -----------------------------------------------------------------------------------


def _parse_json(text: str, source: str) -> tuple[str, list[Row]]:
    try:
        return "json", _rows(_load_json(text), source)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return "jsonl", list(_parse_jsonl(text, source))
        raise FactError(f"{source}: line {error.lineno}: broken JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise FactError(f"{source}: broken JSON: {_reason(error)}") from None


def _is_json(text: str) -> bool:
    """Whether a text that may as well be YAML's flow style begins with a JSON value."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (RecursionError, ValueError):
        return False
    return True


def _parse_jsonl(text: str, source: str) -> Iterator[Row]:
    number = 0
    # Not splitlines(): U+2028 and the like may stand in a JSON text.
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Row(number, _load_json(line), i)
        except (RecursionError, ValueError) as error:
            raise FactError(
                f"{source}: record {number} (line {i}): broken JSON: {_reason(error)}"
            ) from None
        number += 1


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=unique_keys)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


# --- CSV ------------------------------------------------------------------------------------


def _has_csv_header(text: str) -> bool:
    cells = [cell.strip(' "') for cell in text.lstrip().split("\n", 1)[0].split(",")]
    return len(set(cells) & set(REQUIRED)) >= 2


def _parse_csv(text: str, source: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 0
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _csv_header(cells, f"{source}: line {reader.line_num}")
                continue
            row = f"{source}: record {number} (line {reader.line_num})"
            if len(cells) != len(header):
                raise FactError(
                    f"{row}: found {len(cells)} columns, expected {len(header)} "
                    f"({', '.join(header)}): quote a text that holds a comma"
                )
            yield Row(number, _csv_record(header, cells), reader.line_num)
            number += 1
    except csv.Error as error:
        raise FactError(f"{source}: line {reader.line_num}: broken CSV: {error}") from None


def _csv_header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in REQUIRED:
        if name not in header:
            raise FactError(
                f"{where}: the header has no column {name}: expected subject,prompt,target "
                f"and maybe others, with commas between (found {quote(','.join(header))})"
            )
    for name in header:
        if name not in FIELDS:
            raise FactError(
                f"{where}: unknown column {quote(name)}{suggest(name, FIELDS)}; "
                f"expected {', '.join(FIELDS)}"
            )
        if header.count(name) > 1:
            raise FactError(f"{where}: the column {name} stands twice in the header")
    return header


def _csv_record(header: list[str], cells: list[str]) -> dict[str, Any]:
    """Native record of one line; an empty cell is a field left out."""
    record: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.strip() and name not in REQUIRED:
            continue
        record[name] = cell.split(LIST_SEPARATOR) if name in _CSV_LISTS else cell
    for name in _CSV_PROBES:
        if name in record:
            record[name] = [_csv_probe(text) for text in record[name]]
    return record


def _csv_probe(text: str) -> dict[str, str]:
    prompt, arrow, answer = text.rpartition(ANSWER_SEPARATOR)
    return {"prompt": prompt, "answer": answer} if arrow else {"prompt": text}
