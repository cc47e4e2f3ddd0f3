"""The tidy rows of a figure, and their CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nulledit.io.jsonfiles import as_csv

COLUMNS = ("x", "y", "error", "n", "series", "panel", "low", "high")
"""Of the CSV; the last two only where a point has them."""


class Stored:
    """What pydantic reads back from a folder: no other fields, and numbers that are finite."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True)
class Point(Stored):
    """One point, bar or interval of a figure."""

    x: float | str
    """Number or category; of an interval: its name."""
    y: float | None
    """Height; of an interval: the difference. None leaves a gap."""
    error: float | None = None
    """Standard error of y."""
    n: int | None = None
    """What y is a mean over."""
    series: str = ""
    """Method, or `before` and `after`."""
    panel: str = ""
    """Which panel it is in; empty if there is one."""
    low: float | None = None
    """Lower end of a 95 % interval; without, y ± 1.96 `error`."""
    high: float | None = None
    """Upper end."""


def points_csv(points: Sequence[Point]) -> str:
    """Points as CSV with a head; `low` and `high` only where a point has them."""
    wide = any(p.low is not None or p.high is not None for p in points)
    names = COLUMNS if wide else COLUMNS[:6]
    return as_csv([{name: getattr(p, name) for name in names} for p in points], names)


def read_points(text: str) -> tuple[Point, ...]:
    """Points from CSV. x is a number where every x is one. ValueError if it is another table."""
    from pydantic import TypeAdapter

    try:
        reader = csv.DictReader(io.StringIO(text))
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"a figure's CSV is broken: {error}") from None
    if missing := set(COLUMNS[:6]) - set(reader.fieldnames or ()):
        raise ValueError(f"a figure's CSV lacks {', '.join(sorted(missing))}")
    if any(row[name] is None for row in rows for name in COLUMNS[:6]):
        raise ValueError("a figure's CSV has a row that is too short")
    numeric = all(_is_number(row["x"]) for row in rows)
    given = [
        {"x": float(row["x"]) if numeric else row["x"], "y": None}
        | {name: row[name] for name in COLUMNS[1:] if row.get(name)}
        for row in rows
    ]
    return TypeAdapter(tuple[Point, ...]).validate_python(given)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
