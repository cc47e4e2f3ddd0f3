"""Cells of tables: how numbers are written, and which ones are best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nulledit.report.colours import is_unedited
from nulledit.report.document import Cell, Column, Status, StudyTable, Value

ABSENT = "absent"
BEST, TIE = "best", "tie"
SIGNS = {BEST: "●", TIE: "○"}
MEANING = {BEST: "best", TIE: "within one standard error of the best"}


@dataclass(frozen=True)
class Shown:
    """A cell as it is written."""

    text: str
    """The text, the number with its unit's digits, or `absent`."""
    error: str = ""
    """`± 0.5`, empty without a standard error."""
    n: str = ""
    """n, empty where a note or a column has it."""
    mark: str = ""
    """`best`, `tie` or nothing."""
    numeric: bool = False
    """Whether it stands on the right."""
    tone: str = ""
    """Of a status."""
    more: str = ""
    """Of a status: what a page of HTML says below it."""

    def __str__(self) -> str:
        n = f"(n {self.n})" if self.n else ""
        return " ".join(filter(None, (self.text, self.error, n, SIGNS.get(self.mark, ""))))


def shown(table: StudyTable) -> list[list[Shown]]:
    """The table's cells, row by row; n in a last column where it differs from row to row alone."""
    marks = {column.key: _marks(table, column) for column in table.columns}
    by_row = _n_of_rows(table)
    hidden = {key for keys in common_n(table).values() for key in keys}
    rows = []
    for i, row in enumerate(table.rows):
        cells = [_cell(row.get(c.key), c, marks[c.key][i]) for c in table.columns]
        for j, column in enumerate(table.columns):
            if by_row or column.key in hidden:
                cells[j] = replace(cells[j], n="")
        rows.append([*cells, Shown(by_row[i], numeric=True)] if by_row else cells)
    return rows


def heads(table: StudyTable) -> list[str]:
    """The columns' heads with their units, and an arrow to the better end."""
    found = []
    for column in table.columns:
        arrow = {"high": "\u00a0↑", "low": "\u00a0↓"}.get(column.better or "", "")
        unit = f" ({column.unit})" if column.unit and column.unit not in column.title else ""
        found.append(f"{column.title}{unit}{arrow}")
    return [*found, "n"] if _n_of_rows(table) else found


def at_right(table: StudyTable) -> list[bool]:
    """Which of the shown columns hold numbers."""
    rows = shown(table)
    return [any(row[i].numeric for row in rows) for i in range(len(heads(table)))]


def common_n(table: StudyTable) -> dict[int, list[str]]:
    """n -> keys of the columns whose numbers all have it, the n of most columns first."""
    found: dict[int, list[str]] = {}
    for column in table.columns:
        agreed = {n for row in table.rows if (n := _n(row.get(column.key)))}
        if len(agreed) == 1:
            found.setdefault(agreed.pop(), []).append(column.key)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def notes(table: StudyTable) -> list[str]:
    """What a reader of the marks and errors must know, as short sentences."""
    cells = [cell for row in shown(table) for cell in row]
    said = []
    if any(cell.error for cell in cells):
        said.append("± is one standard error")
    if not _n_of_rows(table):
        titles = {column.key: column.title for column in table.columns}
        for i, (n, keys) in enumerate(common_n(table).items()):
            said.append(f"n = {n}" + (f" in {', '.join(titles[key] for key in keys)}" if i else ""))
    marks = [mark for mark in MEANING if any(cell.mark == mark for cell in cells)]
    if marks:
        apart = any(is_unedited(_name(table, row)) for row in table.rows)
        legend = ", ".join(f"{SIGNS[mark]} {MEANING[mark]}" for mark in marks)
        said.append(legend + (" (the unedited model takes no part)" if apart else ""))
    return said


def caption(table: StudyTable) -> str:
    """The table's caption with its notes."""
    said = ". ".join(filter(None, (table.caption.rstrip(". "), *notes(table))))
    return f"{said}." if said else ""


def _n(cell: Cell) -> int | None:
    return cell.n if isinstance(cell, Value) else None


def _n_of_rows(table: StudyTable) -> list[str]:
    """n of each row, where each has one and a column has several; else nothing."""
    columns = [{n for row in table.rows if (n := _n(row.get(c.key)))} for c in table.columns]
    rows = [{n for cell in row.values() if (n := _n(cell))} for row in table.rows]
    if all(len(found) <= 1 for found in columns) or any(len(found) > 1 for found in rows):
        return []
    return ["".join(map(str, found)) for found in rows]


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


def _cell(value: Cell, column: Column, mark: str) -> Shown:
    if isinstance(value, str):
        if isinstance(value, Status):
            return Shown(value, tone=value.tone, more=value.more)
        return Shown(value)
    number, error = _numbers(value)
    if number is None:
        return Shown("not finite" if isinstance(value, Value) else ABSENT, numeric=True)
    said = "" if error is None else f"± {_write(error, column)}"
    return Shown(_write(number, column), said, str(_n(value) or ""), mark, numeric=True)


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
