"""Documents as Markdown; text in them has no meaning there."""

from __future__ import annotations

import re

from nulledit.io.text import markdown, plain, shorten
from nulledit.report import cells
from nulledit.report import document as doc
from nulledit.report.captions import figure_caption
from nulledit.report.cells import ABSENT
from nulledit.report.tables import as_markdown

LONGEST = 300  # columns of a generated text


def markdown_page(document: doc.Document, *, figures: str = "figures/{}") -> str:
    """The document, its figures beside it: FIGURES.png with their names in it."""
    level = "###" if any(isinstance(part, doc.Heading) for part in document.parts) else "##"
    parts = [_part(part, level, figures) for part in document.parts]
    return "\n\n".join(filter(None, (f"# {markdown(document.title)}", *parts))) + "\n"


def _part(part: doc.Part, level: str, figures: str) -> str:
    match part:
        case doc.Heading():
            return f"## {markdown(part.text)}"
        case doc.Text():
            stars = "**" if part.tone == "strong" else ""
            return f"{stars}{markdown(part.text)}{stars}"
        case doc.Items():
            lines = [
                f"- {markdown(name)}: {markdown(text)}" if name else f"- {markdown(text)}"
                for name, text in part.shown()
            ]
            return _titled(level, part.title, "\n".join(lines))
        case doc.Code():
            text = "\n".join(map(plain, part.text.rstrip().split("\n")))
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
            return f"{fence}{part.language}\n{text}\n{fence}"
        case doc.Picture():
            return f"![{markdown(part.text)}]({part.file})"
        case doc.StudyTable():
            said = markdown(cells.caption(part))
            table = as_markdown(part)
            return _titled(level, part.title, f"{table}\n\n{said}" if said else table)
        case doc.Listing():
            return _part(part.table, level, figures)
        case doc.FigureSpec():
            caption, file = markdown(figure_caption(part)), figures.format(part.name)
            return f"![{caption}]({file}.png)\n\n{caption} [CSV]({file}.csv)"
        case doc.Examples():
            head = ("arm", "prompt", "target", "before", "after")
            rows = [
                [
                    ABSENT if e is None else shorten(plain(e), LONGEST)
                    for e in map(vars(x).get, head)
                ]
                for x in part.items
            ]
            return _part(doc.StudyTable.of("examples", part.title, head, rows), level, figures)
    return ""  # settings: the files beside the page have them


def _titled(level: str, title: str, content: str) -> str:
    return f"{level} {markdown(title)}\n\n{content}" if title else content
