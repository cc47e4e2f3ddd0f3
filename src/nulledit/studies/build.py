"""The one builder: declared tables and figures to those of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nulledit.evaluation.measures import AT_RELATIONS, PREFERENCE, STRICT, TOKENS, find
from nulledit.report.document import Column, Example, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.declaration import Cells, Columns, Figure, Part, Table
from nulledit.studies.results import (
    Number,
    Quantity,
    Results,
    Rows,
    difference,
    number,
    quantity,
    rate,
    short,
    shown,
)

DIGITS = {"growth": 2, "kl_worst": 0, "fluency": 1}
"""Of measures of which studies show more or fewer digits than a page of one run does."""
OF_TOKENS = (*TOKENS, "efficacy_strict")
"""zsRE's measures, as published."""
Points = Callable[[Results], Iterable[Point]]


def tables(results: Results, part: Part) -> Iterator[StudyTable]:
    """Every table of a part that has more than its rows' names."""
    for table in part.tables:
        made = [_table(results, table)] if not table.each_arm else []
        for i, along in enumerate(results.arms if table.each_arm else (), 1):
            alone = replace(results, arms=(along,))
            made.append(_table(alone, replace(table, name=f"{table.name}-{i}")))
        yield from filter(None, made)


def _table(results: Results, table: Table) -> StudyTable | None:
    """None for one that has its rows' names at most, or not even these."""
    rows = list(table.rows(results))
    heads: list[Column] = []
    filled: list[dict[str, Any]] = [{} for _ in rows]
    for column in _expanded(table.columns, results):
        made = _cells(column)
        cells = [shown(made.cell(row)) for row in rows]
        if isinstance(column, str) and all(cell is None for cell in cells):
            continue
        heads.append(made.head)
        for row, cell in zip(filled, cells, strict=True):
            row[made.head.key] = cell
    if len(heads) < 2:
        return None
    title, caption = results.text(table.title), results.text(table.caption)
    return StudyTable(table.name, title, caption, tuple(heads), tuple(filled))


def _expanded(columns: Iterable[Columns], results: Results) -> Iterator[str | Column | Cells]:
    for column in columns:
        if callable(column):
            yield from _expanded(column(results), results)
        else:
            yield column


def _cells(column: str | Column | Cells) -> Cells:
    if isinstance(column, str):
        made = find(column).head(short=True, digits=DIGITS.get(column))
        if column == "fluency":  # in hundredths of a bit, as published
            made["unit"] = ""
        return Cells(Column(**made), quantity(column))
    if isinstance(column, Column):
        return Cells(column, lambda row: row.get(column.key))
    return column


def figures(results: Results, part: Part) -> Iterator[FigureSpec]:
    """Every figure of a part that has points."""
    for figure in part.figures:
        if points := tuple(figure.points(results)):
            caption = results.text(figure.spec.caption)
            yield replace(figure.spec, caption=caption, points=points)


def examples(results: Results) -> Iterator[Example]:
    """What the models say by themselves before and after, of facts that were asked for it."""
    for spot in results.ends if results.arms else ():
        for fact in results.queue:
            row, was = spot.rows.get(fact.id, {}), results.base.rows.get(fact.id, {})
            if said := row.get("answer"):
                prompt, holds = fact.render(fact.prompt), bool(row.get("generation"))
                yield Example(spot.label, prompt, fact.target, was.get("answer"), said, holds)


# -- columns -------------------------------------------------------------------------------------


def head(
    key: str, title: str, unit: str = "%", digits: int = 1, better: str | None = None
) -> Column:
    """A column's head, unmarked unless one way is better."""
    return Column(key, title, better, unit, digits)


def labels(title: str) -> Cells:
    """The column that names spots."""
    return Cells(Column("arm", title), lambda spot: spot.label)


def usual(results: Results) -> Iterable[str]:
    """Preference and strict measures, or tokens where the data have no old answers.

    And what stays at other relations of the subjects, where the data ask.
    """
    rates = (*PREFERENCE, *STRICT) if _has_preference(results) else OF_TOKENS
    return (*rates, *AT_RELATIONS)


def _has_preference(results: Results) -> bool:
    return any(rate(spot.rows, "efficacy") for spot in results.ends)


# -- figures -------------------------------------------------------------------------------------


def lines(
    name: str, caption: str, y: str, points: Points, *, x: str = "edits", **more: Any
) -> Figure:
    """Lines, by number of edits or something else."""
    return Figure(FigureSpec(name, caption, "lines", x, y, **more), points)


def scatter(name: str, caption: str, x: str, y: str, points: Points, **more: Any) -> Figure:
    """Points."""
    return Figure(FigureSpec(name, caption, "scatter", x, y, **more), points)


def intervals(
    name: str,
    caption: str,
    points: Points,
    *,
    y: str = "difference (points of %)",
    panel: str = "measure",
) -> Figure:
    """Paired differences, one for each arm."""
    return Figure(FigureSpec(name, caption, "intervals", "arm", y, panel=panel), points)


def point(x: float | str, value: Number, series: str = "", panel: str = "") -> Point:
    """A quantity as a point of a figure; what is not finite is a gap."""
    value = shown(value)
    if isinstance(value, Value):
        return Point(x, _finite(value.mean), _finite(value.standard_error), value.n, series, panel)
    return Point(x, _finite(number(value)), series=series, panel=panel)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def along(quantities: Mapping[str, Quantity], *, start: float | None = None) -> Points:
    """Lines along the streams: panel -> quantity; `start` is where the unedited model is."""

    def points(results: Results) -> Iterator[Point]:
        for panel, what in quantities.items():
            for spots in results.arms:
                found = [point(s.at, what(s), s.label, panel) for s in spots]
                if start is not None and any(p.y is not None for p in found):
                    found.insert(0, point(0, start, found[0].series, panel))
                yield from found if start is None or len(found) > len(spots) else ()

    return points


def rates_along(results: Results) -> Iterable[Point]:
    """Lines of the measures that the data have, a panel for each."""
    names = (*PREFERENCE, "efficacy_strict") if _has_preference(results) else TOKENS
    held = [name for name in names if any(rate(spot.rows, name) for spot in results.ends)]
    return along({short(name): quantity(name) for name in held})(results)


def several(points: Points) -> Points:
    """None where the streams were asked only once."""
    return lambda results: points(results) if len(results.arms[0]) > 1 else ()


def against(x: Quantity, y: Quantity) -> Points:
    """A point for each arm at its end that has both."""
    return lambda results: [
        Point(at, value, series=spot.label)
        for spot in results.ends
        if (at := number(x(spot))) is not None and (value := number(y(spot))) is not None
    ]


def paired(*measures: str) -> Points:
    """Paired differences of the arms that are compared, a panel for each measure."""
    return lambda results: [
        change
        for label, before, after in results.pairs()
        for name in measures
        for change in moved(label, short(name), before.rows, after.rows, name)
    ]


def moved(label: str, panel: str, before: Rows, after: Rows, measure: str) -> Iterator[Point]:
    """A paired difference in points of % with its interval; nothing where no row has both."""
    if found := difference(before, after, measure):
        (mean, low, high), n = found
        yield Point(label, mean, n=n, series=label, panel=panel, low=low, high=high)
