"""The one builder: declared tables and figures to those of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nulledit.evaluation.measures import PREFERENCE, STRICT, TOKENS, find
from nulledit.evaluation.stats import Rate
from nulledit.report.document import Column, Example, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.declaration import Cells, Columns, Figure, Part, Points, Table, Text
from nulledit.studies.results import Quantity, Results, difference, quantity, rate, short

DIGITS = {"kl_worst": 0, "fluency": 1}
"""Of measures that tables of many columns show with fewer."""


def tables(results: Results, part: Part) -> Iterator[StudyTable]:
    """Every table of a part that has more than its rows' names."""
    made = []
    for table in part.tables:
        if not table.each_arm:
            made.append(_table(results, table))
        for i, arm in enumerate(results.arms if table.each_arm else (), 1):
            alone = replace(results, arms=(arm,))
            made.append(_table(alone, replace(table, name=f"{table.name}-{i}")))
    yield from (table for table in made if len(table.columns) > 1)


def _table(results: Results, table: Table) -> StudyTable:
    rows = list(table.rows(results))
    first = table.names
    if isinstance(first, str):
        first = Cells(Column("arm", first), lambda spot: spot.label)
    columns = [_cells(first, table), *_expanded(table.columns, results, table)]
    filled: list[dict[str, Any]] = [{} for _ in rows]
    kept: list[Column] = []
    for column in columns:
        cells = [_shown(column.cell(row)) for row in rows]
        if all(cell is None for cell in cells) and kept:
            continue
        kept.append(column.head)
        for row, cell in zip(filled, cells, strict=True):
            row[column.head.key] = cell
    title, caption = results.text(table.title), results.text(table.caption)
    return StudyTable(table.name, title, caption, tuple(kept), tuple(filled))


def _expanded(columns: Iterable[Columns], results: Results, table: Table) -> Iterator[Cells]:
    for column in columns:
        if callable(column):
            yield from _expanded(column(results), results, table)
        else:
            yield _cells(column, table)


def _cells(column: str | Column | Cells, table: Table) -> Cells:
    if isinstance(column, str):
        return Cells(_head(column, table.digits), quantity(column))
    if isinstance(column, Column):
        return Cells(column, lambda row: row.get(column.key))
    return column


def _head(name: str, digits: Mapping[str, int]) -> Column:
    measure = find(name)
    head = measure.head(short=True, digits={**DIGITS, **digits}.get(name))
    if name == "fluency":  # in hundredths of a bit, as published
        head["unit"] = ""
    return Column(**head)


def _shown(cell: Any) -> Any:
    return Value.percent(cell) if isinstance(cell, Rate) else cell


def figures(results: Results, part: Part) -> Iterator[FigureSpec]:
    """Every figure of a part that has points."""
    for figure in part.figures:
        points = tuple(figure.points(results))
        if points:
            caption = results.text(figure.caption or figure.spec.caption)
            yield replace(figure.spec, caption=caption, points=points)


def examples(results: Results) -> Iterator[Example]:
    """What the models say by themselves before and after, of facts that were asked for it."""
    for spot in results.ends:
        for fact in results.queue:
            row = spot.rows.get(fact.id, {})
            if row.get("answer") is not None:
                was = results.base.rows.get(fact.id, {}).get("answer") if results.base else None
                prompt, holds = fact.render(fact.prompt), bool(row.get("generation"))
                yield Example(spot.label, prompt, fact.target, was, row["answer"], holds)


# -- measures that depend on the data ------------------------------------------------------------


def usual(*more: str) -> Any:
    """Preference and strict measures, or tokens where the data have no old answers, and `more`."""

    def columns(results: Results) -> list[str]:
        asked = [*PREFERENCE, *STRICT] if _has_preference(results) else list(OF_TOKENS)
        return [*asked, *more]

    return columns


OF_TOKENS = (*TOKENS, "efficacy_strict")
"""zsRE's measures, as published."""


def _has_preference(results: Results) -> bool:
    return any(rate(spot.rows, "efficacy") for spot in results.ends)


# -- points --------------------------------------------------------------------------------------


def point(
    x: float | str, value: Rate | Value | float | None, series: str, panel: str = ""
) -> Point:
    """A quantity as a point of a figure; rates are shown in %, what is not finite is a gap."""
    if isinstance(value, Rate):
        value = Value.percent(value)
    if isinstance(value, Value):
        return Point(x, _finite(value.mean), _finite(value.standard_error), value.n, series, panel)
    return Point(x, _finite(value), series=series, panel=panel)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def along(quantities: Mapping[str, Quantity], *, start: float | None = None) -> Points:
    """Lines along the streams: panel -> quantity; `start` is where the unedited model is."""

    def points(results: Results) -> Iterator[Point]:
        for panel, what in quantities.items():
            for arm in results.arms:
                if start is not None and any(what(spot) is not None for spot in arm.spots):
                    yield Point(0, start, series=arm.label, panel=panel)
                for spot in arm.spots:
                    yield point(spot.at, what(spot), arm.label, panel)

    return points


def rates_along(results: Results) -> Iterator[Point]:
    """Lines of the measures that the data have, a panel for each."""
    names = (*PREFERENCE, "efficacy_strict") if _has_preference(results) else TOKENS
    held = [name for name in names if any(rate(spot.rows, name) for spot in results.ends)]
    yield from along({short(name): quantity(name) for name in held})(results)


def against(x: Quantity, y: Quantity) -> Points:
    """A point for each arm at its end that has both."""

    def points(results: Results) -> Iterator[Point]:
        for spot in results.ends:
            at, value = x(spot), y(spot)
            if at is not None and value is not None:
                shown = point(0, at, "").y
                if shown is not None:
                    yield replace(point(shown, value, spot.label), error=None, n=None)

    return points


def paired(*measures: str) -> Points:
    """Paired differences of the arms that are compared, a panel for each measure."""
    return lambda results: [
        change
        for label, before, after in results.pairs()
        for name in measures
        for change in moved(label, short(name), before.rows, after.rows, name)
    ]


def moved(label: str, panel: str, before: Any, after: Any, measure: str) -> Iterator[Point]:
    """A paired difference in points of % with its interval; nothing where no row has both."""
    if found := difference(before, after, measure):
        (mean, low, high), n = found
        yield Point(label, mean, n=n, series=label, panel=panel, low=low, high=high)


def head(
    key: str, title: str, unit: str = "%", digits: int = 1, better: str | None = None
) -> Column:
    """A column's head, unmarked unless one way is better."""
    return Column(key, title, better, unit, digits)


def lines(name: str, caption: Text, y: str, points: Points, **more: Any) -> Figure:
    """A figure of lines by number of edits."""
    return Figure(FigureSpec(name, "", "lines", "edits", y, **more), points, caption)
