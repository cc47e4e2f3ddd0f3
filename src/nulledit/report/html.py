"""One self-contained HTML page of studies and runs: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from nulledit._version import __version__
from nulledit.io.text import plain, shorten
from nulledit.report import cells
from nulledit.report.document import Example, FigureSpec, Study, StudyTable
from nulledit.report.figures import figure_of
from nulledit.report.images import as_image
from nulledit.report.markup import Markup, escape, join, tag
from nulledit.report.points import points_csv
from nulledit.report.tables import ABSENT
from nulledit.report.words import chosen_examples, figure_caption, flat

GENERATOR = '<meta name="generator" content="nulledit '
"""How our pages are known again."""
NOTICES = 10
"""Shown of each part."""
LONGEST = 700  # columns of a generated text
NARROW = "(max-width: 640px)"


@dataclass(frozen=True)
class Part:
    """One folder's part of a page."""

    study: Study
    """Its numbers."""
    sentence: str
    """What was run."""
    source: str = ""
    """The folder, as it was given."""


def html_page(title: str, parts: Sequence[Part]) -> str:
    """The page; several parts get a table of contents."""
    several = len(parts) > 1
    css = resources.files("nulledit").joinpath("assets/report/page.css").read_text("utf-8")
    body = [_part(part, f"part-{i}", own=not several) for i, part in enumerate(parts, 1)]
    head = join(tag("h1", title), _contents(parts)) if several else Markup("")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{GENERATOR}{escape(__version__)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>\n{css}</style>\n</head>\n<body>\n{head}\n"
        + "\n".join(body)
        + f"\n{tag('footer', tag('p', _made(), class_='quiet'))}\n</body>\n</html>\n"
    )


def is_ours(start: str) -> bool:
    """Whether a file that begins so is a page made here."""
    return GENERATOR in start[:500]


def _made() -> str:
    return f"Made by nulledit {__version__}. This page needs no network and no scripts."


def _contents(parts: Sequence[Part]) -> Markup:
    links = [
        tag("li", tag("a", part.study.title, href=f"#part-{i}")) for i, part in enumerate(parts, 1)
    ]
    return tag("nav", tag("ol", *links), aria_label="Contents")


def _part(part: Part, anchor: str, *, own: bool) -> Markup:
    """One folder; with a page of its `own` its title is the page's."""
    study = part.study
    said = [tag("h1" if own else "h2", study.title)]
    if study.question:
        said.append(tag("p", study.question, class_="question"))
    if part.sentence:
        said.append(tag("p", part.sentence, class_="quiet"))
    said += [_notices(study.notices), _limits(study)]
    said += [_table(table, anchor) for table in study.tables]
    said += [_figure(spec) for spec in study.figures]
    said += [_examples(study.examples), _folded(part)]
    return tag("section", *said, id=anchor, class_=None if own else "part")


def _notices(notices: Sequence[str]) -> Markup:
    if not notices:
        return Markup("")
    shown = [tag("li", notice) for notice in notices[:NOTICES]]
    if len(notices) > NOTICES:
        shown.append(tag("li", f"and {len(notices) - NOTICES} more"))
    return tag("div", tag("ul", *shown), class_="note")


def _limits(study: Study) -> Markup:
    told = (("It shows", study.shows), ("It cannot show", study.cannot_show))
    boxes = [tag("div", tag("strong", title), tag("p", said)) for title, said in told if said]
    return tag("div", *boxes, class_="limits") if boxes else Markup("")


def _table(table: StudyTable, anchor: str) -> Markup:
    rows = cells.shown(table)
    numeric = [any(row[i].numeric for row in rows) for i in range(len(table.columns))]
    widths = [max((len(row[i].error) for row in rows), default=0) for i in range(len(numeric))]
    heads = [
        tag("th", cells.head(column), scope="col", class_="num" if right else None)
        for column, right in zip(table.columns, numeric, strict=True)
    ]
    marked = [any(row[i].mark for row in rows) for i in range(len(numeric))]
    lines = []
    for row in rows:
        first, *rest = row
        entries = [tag("th", first.text, scope="row")]
        for i, cell in enumerate(rest, 1):
            entries.append(_cell(cell, numeric[i], widths[i], marked[i]))
        lines.append(tag("tr", *entries))
    inside = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    notes = ". ".join(filter(None, (table.caption.rstrip(". "), *cells.notes(table))))
    return join(
        tag("h3", table.title, id=f"{anchor}-{table.name}"),
        tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=table.title),
        tag("p", notes + ".", class_="quiet") if notes else None,
    )


def _cell(cell: cells.Shown, numeric: bool, error_width: int, marked: bool) -> Markup:
    """A cell; its parts keep their widths so that numbers stand under each other."""
    if not numeric:
        return tag("td", cell.text)
    if cell.text == ABSENT:
        return tag("td", cell.text, class_="num absent")
    parts: list[Markup] = [tag("span", cell.text, class_="best" if cell.mark == cells.BEST else "")]
    if marked:
        sign = cells.SIGNS.get(cell.mark, "")
        parts.append(tag("span", sign, class_="mark", title=cells.MEANING.get(cell.mark)))
    if error_width:
        width = f"min-width: {error_width}ch"
        parts += [Markup(" "), tag("small", cell.error, style=width)]
    if cell.n:
        parts += [Markup(" "), tag("small", f"n {cell.n}")]
    return tag("td", *parts, class_="num")


def _figure(spec: FigureSpec) -> Markup:
    caption = figure_caption(spec)
    wide = as_image(figure_of(spec, spec.points))
    narrow = as_image(figure_of(spec, spec.points, width="narrow"))
    picture = tag(
        "picture",
        tag("source", media=NARROW, srcset=_data(*narrow)),
        tag("img", src=_data(*wide), alt=caption),
    )
    table = points_csv(spec.points).encode("utf-8", "backslashreplace")
    link = tag(
        *("a", f"{spec.name}.csv"),
        href=_data("text/csv", table),
        download=f"{spec.name}.csv",
        class_="download",
    )
    return tag(
        "figure",
        tag("div", picture, class_="card"),
        tag("figcaption", caption, Markup(" "), link),
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _examples(examples: Sequence[Example]) -> Markup:
    groups = [
        tag("div", tag("h3", title), *map(_example, shown))
        for title, shown in chosen_examples(examples)
    ]
    return tag("div", *groups, class_="examples") if groups else Markup("")


def _example(example: Example) -> Markup:
    told = {
        "target": _text(example.target),
        "before": _text(example.before),
        "after": _text(example.after, example.target if example.holds else ""),
    }
    entries = [
        part
        for name, said in told.items()
        for part in (tag("dt", name), tag("dd", said, dir="auto"))
    ]
    arm = tag("p", example.arm, class_="quiet") if example.arm else None
    return tag(
        "div",
        arm,
        tag("p", tag("strong", _text(example.prompt)), dir="auto"),
        tag("dl", *entries),
        class_="example " + ("holds" if example.holds else "fails"),
    )


def _text(said: str | None, target: str = "") -> Markup:
    """A generated text, cut if it is very long, its target marked."""
    if said is None:
        return tag("span", "not asked", class_="absent")
    if not said:
        return tag("span", "(nothing)", class_="absent")
    text = shorten(plain(said), LONGEST)
    found = re.search(re.escape(plain(target)), text, re.IGNORECASE) if target else None
    if not found:
        return join(text)
    start, end = found.span()
    return join(text[:start], tag("mark", text[start:end]), text[end:])


def _folded(part: Part) -> Markup:
    """Settings and environment, closed."""
    study = part.study
    folded = [_details("Settings", [flat(study.settings)])] if study.settings else []
    if study.environment:
        folded.append(_details("Environment", [flat(e) for e in study.environment]))
    if part.source:
        folded.append(tag("p", f"Source: {part.source}", class_="quiet"))
    return join(*folded)


def _details(title: str, columns: Sequence[Mapping[str, str]]) -> Markup:
    """Names and values; several columns for several runs, once where all agree."""
    names = dict.fromkeys(name for column in columns for name in column)
    if all(column == columns[0] for column in columns):
        columns = columns[:1]
    rows = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", c.get(name, "")) for c in columns))
        for name in names
    ]
    table = tag("div", tag("table", tag("tbody", *rows)), class_="scroll")
    return tag("details", tag("summary", title), table)
