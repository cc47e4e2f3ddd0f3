"""The tidy rows behind a figure, and their CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("x", "y", "error", "n", "series", "panel", "low", "high")
"""Of the CSV; the last two only where a point has them."""


@dataclass(frozen=True)
class Point:
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
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    rows.writerows([_csv(getattr(p, name)) for name in names] for p in points)
    return text.getvalue()


def read_points(text: str) -> tuple[Point, ...]:
    """Points from CSV. x is a number where every x is one. ValueError if it is another table."""
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"a figure's CSV is broken: {error}") from None
    head = text.split("\n", 1)[0].strip().split(",")
    if missing := set(COLUMNS[:6]) - set(head):
        raise ValueError(f"a figure's CSV lacks {', '.join(sorted(missing))}")
    if any(row[name] is None for row in rows for name in COLUMNS[:6]):
        raise ValueError("a figure's CSV has a row that is too short")
    numeric = all(_is_number(row["x"]) for row in rows)
    return tuple(
        Point(
            x=float(row["x"]) if numeric else row["x"],
            y=_number(row["y"]),
            error=_number(row["error"]),
            n=int(row["n"]) if row["n"] else None,
            series=row["series"],
            panel=row["panel"],
            low=_number(row.get("low")),
            high=_number(row.get("high")),
        )
        for row in rows
    )


def _csv(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str | None) -> float | None:
    if text and not _is_number(text):
        raise ValueError(f"{text[:60]!r} is no finite number")
    return float(text) if text else None
