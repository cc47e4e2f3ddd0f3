"""Several runs compared, on the facts that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nulledit.evaluation.measures import find, measured
from nulledit.evaluation.stats import Rate, paired_interval
from nulledit.report.document import (
    Cell,
    Column,
    Document,
    FigureSpec,
    Items,
    Listing,
    Study,
    StudyTable,
    Text,
    Value,
)
from nulledit.report.points import Point
from nulledit.report.study import study_document
from nulledit.runs.compared_facts import by_fact, verdict
from nulledit.runs.document import RunFolder, side_effects
from nulledit.runs.holding import after_row, headline
from nulledit.runs.tables import OF_TEXT, interval, of_text, pairs

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""Each fact (id, prompt and target) in the model: its measures after the edit."""
EDITING = ("keys", "values", "solve")
"""Stages of a call that are the edit itself."""


def evaluated(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Those that can be compared."""
    return [run for run in runs if run.evaluated]


def comparison(runs: Sequence[RunFolder]) -> Study | None:
    """The runs compared; None unless two of them were evaluated."""
    if len(runs := evaluated(runs)) < 2:
        return None
    rows = [_rows(run) for run in runs]
    shared = [key for key in rows[0] if all(key in other for other in rows[1:])]
    names = measured(run.evaluated[-1]["after"] for run in runs)
    points = _points(runs, rows, [name for name in names if find(name).unit == "%"])
    tables = [_table(runs, rows, shared, names)]
    if points:
        tables.append(_differences(runs, points))
    return Study(
        name="comparison",
        title="Runs compared",
        question="How do the runs differ on the facts that they share?",
        scale="small",
        settings={},
        environment=(),
        seconds={},
        shows="",
        cannot_show="",
        notices=tuple(_notices(runs, shared)),
        tables=tuple(tables),
        figures=(_figure(runs[0].name, points),) if points else (),
    )


def _notices(runs: Sequence[RunFolder], shared: Sequence[Any]) -> Iterator[str]:
    if not shared:
        yield "The runs share no fact: each row is of the run's own facts."
    if len({run.summary["base"]["hash"] for run in runs}) > 1:
        yield "The runs have different bases: what differs is not of the edits alone."
    if len({run.evaluated[-1]["text"] for run in runs}) > 1:
        yield "Perplexity and KL are left out: the runs were evaluated on different texts."


def compared_document(runs: Sequence[RunFolder], study: Study, facts: Listing) -> Document:
    """The comparison as it is shown: how many facts hold where, the numbers, every fact."""
    shown = study_document(study, about="")
    verdicts = Items(tuple((run.name, _verdict(run)) for run in runs))
    first = (Text(verdict(facts), "strong"), verdicts)
    return replace(shown, parts=(*first, *shown.parts, facts))


def _verdict(run: RunFolder) -> str:
    lines = list(by_fact(run).values())
    return f"{headline(lines)} {side_effects(lines, run.measured)}".strip()


def _rows(run: RunFolder) -> Rows:
    """The latest counts."""
    return {key: after_row(line) for key, line in by_fact(run).items()}


def _table(
    runs: Sequence[RunFolder], rows: Sequence[Rows], shared: Sequence[Any], names: Sequence[str]
) -> StudyTable:
    """After the edits, on the shared facts; only these are a contest."""
    table: list[dict[str, Cell]] = [
        {"run": run.name, "method": str((run.recipe.get("method") or {}).get("name", ""))}
        for run in runs
    ]
    columns = [Column("run", "run"), Column("method", "method")]
    for name in names:
        head = find(name).head()
        columns.append(Column(**head | ({} if shared else {"better": None})))
        for row, held in zip(table, rows, strict=True):
            row[name] = _mean([held[key].get(name) for key in shared or held], find(name).scale)
    sides = [run.evaluated[-1]["after"] for run in runs]
    if len({run.evaluated[-1]["text"] for run in runs}) == 1:
        for name in OF_TEXT:
            found = [of_text(side, name) for side in sides]
            if any(cell is not None for cell in found):
                columns.append(Column(**find(name).head(short=name != "perplexity")))
                for row, cell in zip(table, found, strict=True):
                    row[name] = replace(cell, n=None) if isinstance(cell, Value) else cell
    columns.append(Column("seconds", "seconds of editing"))
    for row, run in zip(table, runs, strict=True):
        row["seconds"] = sum(
            call["seconds"].get(s, 0.0) for call in run.summary["runs"] for s in EDITING
        )
    caption = f"After the edits, on the {len(shared)} facts that all share" if shared else ""
    return StudyTable("runs", "After the edits", caption, tuple(columns), tuple(table))


def _mean(found: Sequence[float | bool | None], scale: float) -> Value | None:
    values = [scale * float(v) for v in found if v is not None]
    if not values:
        return None
    rate = Rate.of(values)
    return Value(rate.mean, rate.standard_error if rate.n > 1 else None, rate.n)


def _points(
    runs: Sequence[RunFolder], rows: Sequence[Rows], names: Sequence[str]
) -> tuple[Point, ...]:
    """Each later run minus the first, per measure, on the facts that the two share."""
    points = []
    for run, held in zip(runs[1:], rows[1:], strict=True):
        keys = [key for key in rows[0] if key in held]
        for name in names:
            a, b = pairs([rows[0][key] for key in keys], [held[key] for key in keys], name)
            if a:
                mean, low, high = paired_interval(a, b, find(name).scale)
                title = find(name).title
                points.append(Point(title, mean, n=len(a), series=run.name, low=low, high=high))
    return tuple(points)


def _differences(runs: Sequence[RunFolder], points: Sequence[Point]) -> StudyTable:
    names = list(dict.fromkeys(str(p.x) for p in points))
    rows: list[dict[str, Cell]] = []
    for run in runs[1:]:
        mine = [p for p in points if p.series == run.name]
        if mine:
            told = {str(p.x): interval((p.y or 0.0, p.low or 0.0, p.high or 0.0)) for p in mine}
            rows.append({"run": run.name, "facts": str(max(p.n or 0 for p in mine)), **told})
    return StudyTable(
        "differences",
        f"Difference from {runs[0].name}",
        "Percentage points, with the 95 % interval of a paired bootstrap over the facts that the "
        "two runs share",
        (Column("run", "run"), Column("facts", "facts"), *(Column(name, name) for name in names)),
        tuple(rows),
    )


def _figure(first: str, points: tuple[Point, ...]) -> FigureSpec:
    return FigureSpec(
        name="differences",
        caption=f"Difference from {first} with 95 % intervals; hollow where the interval has 0.",
        kind="intervals",
        x="measure",
        y="difference",
        series="run",
        labels={"x": "", "y": f"difference from {first} (percentage points)"},
        points=points,
    )
