"""Documents as one self-contained HTML page: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from nulledit._version import __version__
from nulledit.io.text import plain, shorten
from nulledit.report import cells
from nulledit.report import document as doc
from nulledit.report.captions import figure_caption
from nulledit.report.figures import figure_of
from nulledit.report.images import as_image
from nulledit.report.points import points_csv
from nulledit.report.tables import TURNED

GENERATOR = '<meta name="generator" content="nulledit '
"""How our pages are known again."""
LONGEST = 700  # columns of a generated text


def html_page(title: str, documents: Sequence[doc.Document]) -> str:
    """The page; several documents get a table of contents."""
    return (
        templates()
        .get_template("report/page.html")
        .render(
            title=title,
            documents=[(d.title, [seen(part) for part in d.parts]) for d in documents],
            version=__version__,
            css=Markup(asset("report/page.css")),
            chosen=_chosen(documents),
        )
    )


def _chosen(documents: Sequence[doc.Document]) -> list[tuple[int, int]]:
    """Choice and option of every listing that hides rows: one rule of the page's style each."""
    listings = [part for d in documents for part in d.parts if isinstance(part, doc.Listing)]
    found = {
        (i, j)
        for listing in listings
        for i, (_, choices) in enumerate(listing.choices)
        for j, choice in enumerate(choices)
        if choice.rows is not None
    }
    return sorted(found)


def templates() -> Environment:
    """The templates in `assets`, by their path there; `report/parts.html` shows any part.

    Everything but the templates is escaped, and control and direction characters are written out.
    """
    return Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """The text of a file in `assets`."""
    return resources.files("nulledit").joinpath("assets", name).read_text("utf-8")


def is_ours(start: str) -> bool:
    """Whether a file that begins so is a page made here."""
    return GENERATOR in start[:500]


def _plain(value: object) -> object:
    return value if isinstance(value, Markup) else plain(value)


def seen(part: doc.Part) -> tuple[str, Any]:
    """The name of what a part is, and what `show` of `report/parts.html` needs of it."""
    found: Any = part
    if isinstance(part, doc.StudyTable):
        found = _table(part)
    elif isinstance(part, doc.Listing):
        found = _listing(part)
    elif isinstance(part, doc.FigureSpec):
        found = _figure(part)
    elif isinstance(part, doc.Details):
        columns = part.items[:1] if all(c == part.items[0] for c in part.items) else part.items
        names = dict.fromkeys(name for column in columns for name in column)
        rows = [(name, [c.get(name, "") for c in columns]) for name in names]
        found = {"title": part.title, "rows": rows}
    elif isinstance(part, doc.Examples):
        found = {"title": part.title, "items": [_example(e) for e in part.items]}
    return type(part).__name__, found


def _table(table: doc.StudyTable, *, turns: bool = True) -> Mapping[str, Any]:
    """Cells with what keeps their numbers under each other.

    A few rows of many columns are turned, as on a terminal: a line a column needs no scrolling.
    Not where rows are chosen from (`turns`).
    """
    rows, heads = cells.shown(table), cells.heads(table)
    if turns and 1 < len(rows) and TURNED * len(rows) < len(heads):
        names = [row[0].text for row in rows]
        rows = [
            [cells.Shown(head), *column]
            for head, *column in zip(heads[1:], *(row[1:] for row in rows), strict=True)
        ]
        heads = [heads[0], *names]
    right = [any(row[i].numeric for row in rows) for i in range(len(heads))]
    return {
        "name": table.name,
        "title": table.title,
        "heads": list(zip(heads, right, strict=True)),
        "rows": rows,
        "marked": [any(row[i].mark for row in rows) for i in range(len(right))],
        "errors": [max((len(row[i].error) for row in rows), default=0) for i in range(len(right))],
        "caption": cells.caption(table),
        "signs": cells.SIGNS,
        "meaning": cells.MEANING,
    }


def _listing(listing: doc.Listing) -> Mapping[str, Any]:
    """The table, and for each row a class for every option that has it."""
    n = len(listing.items)
    classes: list[list[str]] = [[] for _ in range(n)]
    for i, (_, choices) in enumerate(listing.choices):
        for j, choice in enumerate(choices):
            for row in choice.rows or ():
                classes[row].append(f"r{i}-{j}")
    counted = [
        (title, [(c.title, n if c.rows is None else len(c.rows)) for c in options])
        for title, options in listing.choices
    ]
    return {
        "table": _table(listing.table, turns=False),
        "choices": counted,
        "classes": [" ".join(own) for own in classes],
    }


def _figure(spec: doc.FigureSpec) -> Mapping[str, str]:
    table = points_csv(spec.points).encode("utf-8", "backslashreplace")
    return {
        "name": spec.name,
        "caption": figure_caption(spec),
        "image": _data(*as_image(figure_of(spec, spec.points))),
        "csv": _data("text/csv", table),
    }


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _example(example: doc.Example) -> Mapping[str, Any]:
    return {
        "arm": example.arm,
        "holds": example.holds,
        "prompt": _cut(example.prompt),
        "said": {
            "target": _cut(example.target),
            "before": _cut(example.before),
            "after": _cut(example.after, example.target if example.holds else ""),
        },
    }


def _cut(said: str | None, target: str = "") -> tuple[str, str, str] | str:
    """A generated text around the target that is marked in it; a remark where there is none."""
    if not said:
        return "not asked" if said is None else "(nothing)"
    text = shorten(plain(said), LONGEST)
    found = re.search(re.escape(plain(target)), text, re.IGNORECASE) if target else None
    start, end = found.span() if found else (len(text), len(text))
    return text[:start], text[start:end], text[end:]
