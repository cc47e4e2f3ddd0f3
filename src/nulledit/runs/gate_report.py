"""What became of limits on a model: a report, and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nulledit.io.notebook import html_table
from nulledit.io.text import count
from nulledit.report.cells import heads, shown
from nulledit.report.document import Status, StudyTable

FAILED, OK, UNMEASURED = "FAILED", "ok", "not measured"
MOST_DIGITS = 7


@dataclass(frozen=True)
class Row:
    """One limit and what was found."""

    name: str
    """As in the limits; a task's name follows capability_drop."""
    found: float | None
    """In the unit; None if it was not measured, nan or infinite where the model is."""
    error: float | None
    """Standard error, same unit; None for what is no estimate, or for n = 1."""
    n: int | None
    """What an estimate is over."""
    over: str
    """facts, windows, pieces, items or layers."""
    side: str
    """at_least or at_most."""
    limit: float
    """The bound, same unit."""
    confident: bool
    """Whether the bound has to hold by one-sided 95 %."""
    verdict: str
    """ok, FAILED or not measured (only of a limit that is optional)."""
    note: str = ""
    """The layer where it was found, how it is spread, or why nothing was."""
    unit: str = "%"
    """% or points of %; mnat for KL per token, nat for KL at other relations."""


@dataclass(frozen=True, repr=False)
class GateReport:
    """What became of each limit."""

    rows: tuple[Row, ...]
    """In the limits' order."""
    source: str = ""
    """Where the limits came from."""

    @property
    def passed(self) -> bool:
        """Whether no limit failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of those that did."""
        return tuple(row.name for row in self.rows if row.verdict == FAILED)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite are None."""
        rows = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(row).items()
            }
            for row in self.rows
        ]
        return {
            "passed": self.passed,
            "failed": list(self.failed),
            "limits": self.source,
            "rows": rows,
        }

    def __repr__(self) -> str:
        found = f"failed: {', '.join(self.failed)}" if self.failed else "all hold"
        return f"<GateReport of {count(len(self.rows), 'limit')} ({self.source}): {found}>"

    def _repr_html_(self) -> str:
        table = gate_table(self)
        rows = [[str(cell) for cell in row] for row in shown(table)]
        return html_table(f"Limits: {self.source}", heads(table), rows)


def gate_table(report: GateReport) -> StudyTable:
    """One row per limit: whether it holds, what was found, what is allowed."""
    tones = {OK: "good", FAILED: "bad"}
    head = ["limit", "", "found (%)", "n", "allowed (%)", ""]
    rows: list[Sequence[str]] = [
        [
            row.name,
            Status(row.verdict, tones.get(row.verdict, "weak")),
            *(_found(row), _count(row), _allowed(row), row.note),
        ]
        for row in report.rows
    ]
    return StudyTable.of("limits", "", head, rows)


def _found(row: Row) -> str:
    if row.found is None:
        return UNMEASURED if row.verdict == FAILED else ""
    digits = _digits(row.found, row.limit)
    text = f"{round(row.found, digits) + 0.0:.{digits}f}"  # no -0.0
    return (text if row.error is None else f"{text} ± {row.error:.{digits}f}") + _unit(row)


def _digits(found: float, limit: float) -> int:
    """As many as show on which side of `limit` it is."""

    def side(value: float) -> tuple[bool, bool]:
        return value < limit, value > limit

    return next((d for d in range(1, MOST_DIGITS) if side(round(found, d)) == side(found)), 1)


def _count(row: Row) -> str:
    return "" if row.n is None else count(row.n, row.over.removesuffix("s"))


def _allowed(row: Row) -> str:
    sign = "≥" if row.side == "at_least" else "≤"
    return f"{sign} {row.limit:g}{_unit(row)}" + " at 95 %" * row.confident


def _unit(row: Row) -> str:
    """What the column's head does not say."""
    return "" if row.unit == "%" else f" {row.unit}"
