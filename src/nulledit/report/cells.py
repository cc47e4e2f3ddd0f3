"""Cells of a study's tables: how numbers are written, and which ones are best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nulledit.report.colours import is_unedited
from nulledit.report.document import Cell, Column, StudyTable, Value
from nulledit.report.tables import ABSENT, Table

BEST, TIE = "best", "tie"
SIGNS = {BEST: "●", TIE: "○"}
MEANING = {BEST: "best of its column", TIE: "within one standard error of the best"}


@dataclass(frozen=True)
class Shown:
    """A cell as it is written."""

    text: str
    """The text, the number with its unit's digits, or `absent`."""
    error: str = ""
    """`± 0.5`, empty without a standard error."""
    n: str = ""
    """n, empty where all numbers of the column have the same (`common_n`)."""
    mark: str = ""
    """`best`, `tie` or nothing."""
    numeric: bool = False
    """Whether it stands on the right."""


def shown(table: StudyTable) -> list[list[Shown]]:
    """The table's cells, row by row."""
    marks = {column.key: _marks(table, column) for column in table.columns}
    hidden = {key for keys in common_n(table).values() for key in keys}
    return [
        [_cell(row.get(c.key), c, marks[c.key][i], hide_n=c.key in hidden) for c in table.columns]
        for i, row in enumerate(table.rows)
    ]


def common_n(table: StudyTable) -> dict[int, list[str]]:
    """n -> keys of the columns whose numbers all have it, the n of most columns first."""
    found: dict[int, list[str]] = {}
    for column in table.columns:
        cells = [row.get(column.key) for row in table.rows]
        agreed = {cell.n for cell in cells if isinstance(cell, Value) and cell.n}
        if len(agreed) == 1:
            found.setdefault(agreed.pop(), []).append(column.key)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def notes(table: StudyTable) -> list[str]:
    """What a reader of the marks and errors must know, as short sentences."""
    cells = [cell for row in shown(table) for cell in row]
    said = []
    if any(cell.error for cell in cells):
        said.append("± is one standard error")
    titles = {column.key: column.title for column in table.columns}
    for i, (n, keys) in enumerate(common_n(table).items()):
        said.append(f"n = {n}" + (f" in {', '.join(titles[key] for key in keys)}" if i else ""))
    marks = [mark for mark in MEANING if any(cell.mark == mark for cell in cells)]
    if marks:
        apart = any(is_unedited(_name(table, row)) for row in table.rows)
        legend = ", ".join(f"{SIGNS[mark]} {MEANING[mark]}" for mark in marks)
        said.append(legend + (" (the unedited model takes no part)" if apart else ""))
    return said


def head(column: Column) -> str:
    """The column's head with its unit, and an arrow to the better end."""
    arrow = {"high": "\u00a0↑", "low": "\u00a0↓"}.get(column.better or "", "")
    unit = f" ({column.unit})" if column.unit and column.unit not in column.title else ""
    return f"{column.title}{unit}{arrow}"


def study_table(table: StudyTable) -> Table:
    """The table as text cells, for a terminal or Markdown."""
    rows: list[Sequence[str]] = [
        [
            " ".join(
                part
                for part in (c.text, c.error, c.n and f"(n {c.n})", SIGNS.get(c.mark, ""))
                if part
            )
            for c in row
        ]
        for row in shown(table)
    ]
    return [head(column) for column in table.columns], rows


def _marks(table: StudyTable, column: Column) -> list[str]:
    """`best`, `tie` or nothing for each row; numbers that are written alike are marked alike."""
    numbers: dict[int, tuple[float, float]] = {}
    for i, row in enumerate(table.rows):
        value, error = _numbers(row.get(column.key))
        if value is not None and not is_unedited(_name(table, row)):
            numbers[i] = (value, error or 0.0)
    marks = [""] * len(table.rows)
    if column.better is None or len(numbers) < 2:
        return marks
    sign = 1 if column.better == "high" else -1
    best, _ = max(numbers.values(), key=lambda v: sign * v[0])
    alike = {i for i, (v, _) in numbers.items() if _write(v, column) == _write(best, column)}
    if len(alike) == len(numbers):
        return marks  # no contest
    error = max(numbers[i][1] for i in alike)
    for i, (value, _) in numbers.items():
        if i in alike:
            marks[i] = BEST
        elif abs(value - best) <= error:
            marks[i] = TIE
    return marks


def _cell(value: Cell, column: Column, mark: str, *, hide_n: bool) -> Shown:
    if isinstance(value, str):
        return Shown(value)
    number, error = _numbers(value)
    if number is None:
        missing = isinstance(value, Value)
        return Shown("not finite" if missing else ABSENT, numeric=True)
    n = str(value.n) if isinstance(value, Value) and value.n and not hide_n else ""
    said = "" if error is None else f"± {_write(error, column)}"
    return Shown(_write(number, column), said, n, mark, numeric=True)


def _numbers(value: Cell) -> tuple[float | None, float | None]:
    """Number and standard error of a cell, where it has finite ones."""
    if isinstance(value, Value):
        return _finite(value.mean), _finite(value.standard_error)
    return (None if isinstance(value, str) else _finite(value)), None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _write(value: float, column: Column) -> str:
    if abs(value) < 1e-12:  # what rounding leaves of a zero
        value = 0.0
    text = f"{value:.{column.digits}f}"
    if abs(value) >= 1e6 or (value and float(text) == 0):
        text = f"{value:.2g}"  # neither a row of digits nor a false zero
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def _name(table: StudyTable, row: Mapping[str, Cell]) -> str:
    return str(row.get(table.columns[0].key) or "")
