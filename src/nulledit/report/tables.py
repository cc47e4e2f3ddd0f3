"""Results as tables, for a terminal and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nulledit.io.text import markdown, plain, shorten, width

ABSENT = "absent"
Table = tuple[Sequence[str], list[Sequence[str]]]
"""Column heads and rows."""


def as_text(table: Table, *, left: int = 1, most: int = 60) -> str:
    """Aligned columns for a terminal; the first `left` stand left, the others right.

    Cells are made plain and cut to `most` columns; wide (East Asian) characters count as two.
    """
    head, rows = table
    cells = [[shorten(plain(c), most) for c in row] for row in (head, *rows)]
    widths = [max(width(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = [
            c + " " * (w - width(c)) if i < left else " " * (w - width(c)) + c
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def as_markdown(table: Table, *, left: int | Collection[int] = 1) -> str:
    """The same table in Markdown; the first `left` columns, or those given, stand left."""
    head, rows = table
    at_left = range(left) if isinstance(left, int) else left
    rule = ["---" if i in at_left else "---:" for i in range(len(head))]
    lines = [[markdown(c) for c in head], rule, *([markdown(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its standard error, in percent; what the data lacks is absent."""
    if not rate or not rate["n"]:
        return ABSENT
    mean, error = rate["mean"], rate["standard_error"]
    return plus_minus(None if mean is None else 100 * mean, error and 100 * error, 1)


def number(value: float | None) -> str:
    """A share or error in three digits."""
    return ABSENT if value is None or value != value else f"{value:.3g}"


def number_plus_minus(value: float | None, error: float | None) -> str:
    """A number of any size with its standard error, where it has one."""
    known = error is not None and math.isfinite(error)
    return number(value) + (f" ± {number(error)}" if known else "")


def plus_minus(value: float | None, error: float | None, digits: int) -> str:
    """A value with its standard error; one alone has none."""
    if value is None:
        return "not finite"
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def spoken(answer: str | None) -> str:
    """What a model said, in a table; None if it was not asked."""
    return ABSENT if answer is None else answer
