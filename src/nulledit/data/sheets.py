"""Facts in CSV: commas, semicolons or tabs; nulledit's columns or another project's."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from nulledit.data.facts import FIELDS, PROBES, REQUIRED, quote, suggest
from nulledit.data.formats import KNOWN_NAMES, NATIVE, SEVERAL, detect_shape, essential_names
from nulledit.data.views import Row
from nulledit.errors import FactError

LIST_SEPARATOR = "|"
ANSWER_SEPARATOR = "=>"
DELIMITERS = ",;\t"
_LISTS = ("target_aliases", "more_prompts", "paraphrases", *PROBES)
_NOTHING = ("NaN", "nan")  # pandas' word for an empty cell
_INDEX = re.compile(r"(Unnamed: \d+)?")  # pandas' name for the column of its index
_FLOAT = re.compile(r"-?\d+\.0")  # what pandas makes of integers beside an empty cell
_CANONICAL = {name.casefold(): name for name in KNOWN_NAMES}

Table = tuple[list[Row], tuple[str, ...]]


def has_header(text: str) -> bool:
    """Whether the first line names columns of facts."""
    return _found(_cells(text, _delimiter(text))) >= 2


def parse_sheet(text: str, source: str) -> Table:
    """Records of a CSV text, and what was changed in it."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(text))
    header: list[str] = []
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header:
                lines.append((reader.line_num, cells))
            else:
                header = _header(cells, f"{source}: line {reader.line_num}")
    except csv.Error as error:
        raise FactError(f"{source}: line {reader.line_num}: broken CSV: {error}") from None
    whole = [cells for _, cells in lines if len(cells) == len(header)]
    notices = [f"{source}: {said}" for said in _as_before_pandas(header, whole)]
    return [_row(i, line, header, cells) for i, (line, cells) in enumerate(lines)], tuple(notices)


def _delimiter(text: str) -> str:
    """The delimiter that finds the most columns we know in the first line."""
    return max(DELIMITERS, key=lambda sign: _found(_cells(text, sign)))


def _cells(text: str, delimiter: str) -> list[str]:
    line = text.lstrip("\r\n ").split("\n", 1)[0]
    try:
        return [_canonical(cell) for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _canonical(cell: str) -> str:
    """A column's name as the formats have it, whatever its capitals."""
    name = cell.strip()
    return _CANONICAL.get(name.casefold(), name)


def _found(names: Sequence[str]) -> int:
    """How many of the names tell a format."""
    telling = essential_names(detect_shape(_tops(names)))
    return sum(name.split(".", 1)[0] in telling for name in set(names))


def _tops(names: Sequence[str]) -> set[str]:
    """Names up to their first dot, as pandas writes what lies inside another field."""
    return {name.split(".", 1)[0] for name in names}


def _header(cells: list[str], where: str) -> list[str]:
    """Checked names of the columns; the one of an index has none."""
    header = ["" if _INDEX.fullmatch(cell.strip()) else _canonical(cell) for cell in cells]
    for name in header:
        if name and header.count(name) > 1:
            raise FactError(f"{where}: the column {quote(name)} stands twice in the header")
    if detect_shape(_tops(header)) != NATIVE:
        return header
    for name in REQUIRED:
        if name not in header:
            raise FactError(
                f"{where}: the header has no column {name}: expected subject,prompt,target "
                f"and maybe others, or another project's names (found {quote(','.join(cells))})"
            )
    for name in header:
        if name and name not in FIELDS:
            raise FactError(
                f"{where}: unknown column {quote(name)}{suggest(name, FIELDS)}; "
                f"expected {', '.join(FIELDS)}"
            )
    return header


def _as_before_pandas(header: list[str], table: list[list[str]]) -> list[str]:
    """Undo in place what pandas does to cells; a notice for each kind of change."""
    notices = []
    emptied = 0
    for cells in table:
        for i, cell in enumerate(cells):
            if cell.strip() in _NOTHING:
                cells[i] = ""
                emptied += 1
    if emptied:
        notices.append(f"{emptied} cells say NaN: read as empty")
    for i, name in enumerate(header):
        column = [cells[i].strip() for cells in table]
        filled = [cell for cell in column if cell]
        gaps = "" in header or len(filled) < len(column)
        if name and gaps and filled and all(map(_FLOAT.fullmatch, filled)):
            for cells in table:
                cells[i] = cells[i].strip().removesuffix(".0")
            notices.append(f"column {name}: numbers such as {filled[0]} read without .0")
    return notices


def _row(number: int, line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        return Row(
            number,
            None,
            line,
            f"found {len(cells)} columns, expected {len(header)} "
            f"({quote(', '.join(header))}): quote a text that holds the delimiter",
        )
    pairs = [(name, cell) for name, cell in zip(header, cells, strict=True) if name]
    if detect_shape(_tops(header)) == NATIVE:
        return Row(number, _native(pairs), line)
    record: dict[str, Any] = {}
    for name, cell in pairs:
        *path, last = name.split(".")
        inner = record
        for step in path:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                return Row(number, None, line, f"column {quote(name)} lies inside a text")
        try:
            inner[last] = _foreign(last, cell)
        except ValueError as error:
            return Row(number, None, line, str(error))
    return Row(number, record, line)


def _native(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Native record of one line; an empty cell is a field left out."""
    record: dict[str, Any] = {}
    for name, cell in pairs:
        if cell.strip() or name in REQUIRED:
            record[name] = _split(cell) if name in _LISTS else cell
    for name in PROBES:
        if name in record:
            record[name] = [_probe(text) for text in record[name]]
    return record


def _split(cell: str) -> list[str]:
    return [text.strip() for text in cell.split(LIST_SEPARATOR)]


def _probe(text: str) -> dict[str, str]:
    prompt, arrow, answer = text.rpartition(ANSWER_SEPARATOR)
    return {"prompt": prompt, "answer": answer} if arrow else {"prompt": text}


def _foreign(name: str, cell: str) -> Any:
    """Text, or the texts of a cell that may hold several; ValueError for Python's own notation."""
    if name not in SEVERAL:
        return cell
    if cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (RecursionError, ValueError):
            raise ValueError(
                f"{name} looks like a list of Python's: write JSON, or the texts with "
                f"{LIST_SEPARATOR} between (found {quote(cell)})"
            ) from None
    return _split(cell) if LIST_SEPARATOR in cell else cell
