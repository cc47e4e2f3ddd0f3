"""Several runs compared, on the facts that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nulledit.evaluation.measures import find, measured
from nulledit.evaluation.stats import Rate, paired_bootstrap
from nulledit.report.document import Cell, Column, FigureSpec, Study, StudyTable, Value
from nulledit.report.points import Point
from nulledit.runs.document import RunFolder
from nulledit.runs.holding import after_row
from nulledit.runs.tables import OF_TEXT, interval, of_text, pairs

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""Each fact (id, prompt and target) in the model: its measures after the edit."""
EDITING = ("keys", "values", "solve")
"""Stages of a call that are the edit itself."""


def comparison(runs: Sequence[RunFolder]) -> Study | None:
    """The runs compared; None unless two of them were evaluated."""
    runs = [run for run in runs if run.evaluated]
    if len(runs) < 2:
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
        notices=() if shared else ("The runs share no fact: each row is of the run's own facts.",),
        tables=tuple(tables),
        figures=(_figure(runs[0].name, points),) if points else (),
    )


def _rows(run: RunFolder) -> Rows:
    """The latest counts."""
    return {
        (line["id"], line["prompt"], line["target"]): after_row(line)
        for line in run.lines
        if line["after"] and line.get("active", True)
    }


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
                mean, low, high = paired_bootstrap(a, b)
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
