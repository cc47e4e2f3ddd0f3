"""Documents on a terminal: its width, its colours, and nothing in them that could steer it."""

from __future__ import annotations

import os
import sys

from nulledit.io.text import plain
from nulledit.report import cells
from nulledit.report import document as doc
from nulledit.report.tables import as_text


def has_colours() -> bool:
    """Whether stdout is a terminal and nobody asked for NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def on_terminal(
    part: str | doc.Part | doc.Document, *, columns: int | None = None, colour: bool = False
) -> str:
    """What stdout shows of a part or a document; figures and settings are for pages."""
    match part:
        case str():
            return "\n".join(map(plain, part.split("\n")))
        case doc.Document():
            parts = [on_terminal(p, columns=columns, colour=colour) for p in part.parts]
            return "\n\n".join(filter(None, (plain(part.title), *parts)))
        case doc.StudyTable():
            table = as_text(part, columns=columns, colour=colour)
            return "\n".join(filter(None, (plain(part.title), table, plain(cells.caption(part)))))
        case doc.Listing():
            return on_terminal(part.table, columns=columns, colour=colour)
        case doc.Heading() | doc.Text():
            return plain(part.text)
        case doc.Items():
            lines = [f"  {plain(name)}{': ' * bool(name)}{plain(t)}" for name, t in part.shown()]
            return "\n".join(filter(None, (plain(part.title), *lines)))
        case doc.Code():
            return "\n".join(f"    {plain(line)}" for line in part.text.split("\n"))
        case doc.Examples():
            head = ("prompt", "target", "before", "after")
            rows = [[vars(e)[name] or "" for name in head] for e in part.items]
            shown = doc.StudyTable.of("examples", part.title, head, rows)
            return on_terminal(shown, columns=columns, colour=colour)
    return ""
