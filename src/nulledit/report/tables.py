"""Tables as text: aligned and as wide as the terminal, or in Markdown."""

from __future__ import annotations

import math
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from nulledit.io.text import markdown, plain, shorten, width
from nulledit.report import cells
from nulledit.report.cells import ABSENT
from nulledit.report.document import Status, StudyTable

LONGEST = 60  # columns of a text on a terminal
WIDEST = 200  # columns where there is no terminal
TURNED = 3  # a table with so many times more columns than rows is turned where it is too wide
LEAST, HEAD = 12, 6  # columns that a text keeps beside others, and a head that is broken
GAP = "  "
NO_NUMBER = ("", ABSENT, "not finite", "not measured")
"""What a column of numbers holds besides."""
_COLOURS = {"good": "32", "weak": "33", "bad": "31"}


def as_text(table: StudyTable, *, columns: int | None = None, colour: bool = False) -> str:
    """Aligned columns for a terminal: texts at the left, numbers at the right.

    Cells are made plain and cut to `LONGEST` columns; wide (East Asian) characters count as two.
    What is wider than `columns` (left out: than the terminal on stdout, if it is one) has its texts
    cut further, never a number; where that is not enough each row becomes a block of lines. A few
    rows of very many columns are turned: a line a column. `colour`: statuses in the colour of their
    tone.
    """
    head, rows, at_left = _grid(table)
    columns = columns or (shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    turned = [list(column) for column in zip(map(Status, head), *rows, strict=True)]
    if (len(rows) > 1 or columns is None) and TURNED * len(rows) < len(head):
        if _natural(turned) <= (columns or WIDEST) < _natural([head, *rows]):
            (head, *rows), at_left = turned, {0}
    shown = [[shorten(plain(c), LONGEST) for c in row] for row in (head, *rows)]
    widths = _widths(shown, columns)
    if widths is None:
        return _blocks(shown, rows, columns or 0, colour=colour)
    heads = (
        textwrap.wrap(head, max(1, w)) or [""] for head, w in zip(shown[0], widths, strict=True)
    )
    above = [*zip_longest(*heads, fillvalue=""), ["─" * w for w in widths]]
    lines = []
    for i, row in enumerate([*above, *shown[1:]], -len(above)):
        padded = []
        for j, (cell, w) in enumerate(zip(row, widths, strict=True)):
            text = shorten(cell, w)
            space = " " * (w - width(text))
            if colour and i >= 0:
                text = _painted(text, rows[i][j])
            padded.append(text + space if j in at_left else space + text)
        lines.append(GAP.join(padded).rstrip())
    return "\n".join(lines)


def as_markdown(table: StudyTable) -> str:
    """The same table in Markdown."""
    head, rows, at_left = _grid(table)
    rule = ["---" if i in at_left else "---:" for i in range(len(head))]
    lines = [[markdown(c) for c in head], rule, *([markdown(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its standard error, in percent; what the data lacks is absent."""
    if not rate or not rate["n"]:
        return ABSENT
    mean, error = rate["mean"], rate["standard_error"]
    if mean is None:
        return "not finite"
    known = error is not None and math.isfinite(error)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if known else "")


def number(value: float | None) -> str:
    """A share or error in three digits."""
    return ABSENT if value is None or value != value else f"{value:.3g}"


def _grid(table: StudyTable) -> tuple[Sequence[str], list[list[Status]], Collection[int]]:
    """Heads, rows, and which columns are at the left: the first, and those with any text."""
    head, shown = cells.heads(table), cells.shown(table)
    rows = [[Status(str(cell), cell.tone) for cell in row] for row in shown]
    texts = (i for i in range(1, len(head)) if not all(_counts(row[i]) for row in rows))
    return head, rows, {0, *texts}


def _natural(rows: Sequence[Sequence[str]]) -> int:
    """How wide the rows are, with nothing cut."""
    widest = [max(width(plain(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return sum(min(w, LONGEST) for w in widest) + len(GAP) * (len(widest) - 1)


def _widths(shown: Sequence[Sequence[str]], columns: int | None) -> list[int] | None:
    """Of each column, the widest ones cut where there are too many; None if that can't do."""
    found = [max(map(width, column)) for column in zip(*shown, strict=True)]
    if columns is None:
        return found
    gaps = len(GAP) * (len(found) - 1)
    least = []
    for w, (head, *cells_below) in zip(found, zip(*shown, strict=True), strict=True):
        numbers = [width(c) for c in cells_below if _is_number(c)]
        least.append(max(*numbers, min(width(head), HEAD)) if numbers else min(w, LEAST))
    if sum(least) + gaps > columns:
        return None
    while sum(found) + gaps > columns:
        widest = max((i for i, w in enumerate(found) if w > least[i]), key=lambda i: found[i])
        found[widest] -= 1
    return found


def _blocks(
    shown: Sequence[Sequence[str]], rows: Sequence[Sequence[Status]], columns: int, *, colour: bool
) -> str:
    """Each row as lines of its own: what it is of, then head and cell."""
    (first, *names), *below = shown
    label = min(max(map(width, names), default=0), columns // 3)
    lines = []
    for row, given in zip(below, rows, strict=True):
        what = f"{first} {row[0]}" if first and _is_number(row[0]) else row[0]
        lines += [shorten(what, columns)] if what else []
        for i, name in enumerate(names, 1):
            if row[i]:
                said = shorten(name, label)
                text = shorten(row[i], max(1, columns - label - 4))
                text = _painted(text, given[i]) if colour else text
                lines.append(f"{GAP}{said}{' ' * (label - width(said))}{GAP}{text}")
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    """`1.0 ± 0.5`, `100 of 1536`, `12 windows`."""
    return bool(re.match(r"[≥≤+−-]? ?\d", cell)) and sum(c.isalpha() for c in cell) <= 8


def _counts(cell: str) -> bool:
    """Whether it may be in a column of numbers."""
    return cell in NO_NUMBER or _is_number(cell)


def _painted(text: str, cell: Status) -> str:
    code = _COLOURS.get(cell.tone)
    return f"\x1b[{code}m{text}\x1b[0m" if code else text
