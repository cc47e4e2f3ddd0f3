"""Several runs beside each other, on the facts that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nulledit.evaluation.measures import find, measured
from nulledit.evaluation.stats import Rate, paired_bootstrap
from nulledit.report.document import Cell, Column, FigureSpec, Study, StudyTable, Value
from nulledit.report.points import Point
from nulledit.runs.document import RunFolder, kl, pairs, perplexity, signed
from nulledit.runs.holding import after_row

Key = tuple[str, str, str]
"""Id, prompt and target: what makes two lines the same fact."""


def comparison(runs: Sequence[RunFolder]) -> Study | None:
    """The runs compared; None unless two of them were evaluated."""
    runs = [run for run in runs if run.evaluated]
    if len(runs) < 2:
        return None
    rows = [_rows(run) for run in runs]
    shared = [key for key in rows[0] if all(key in other for other in rows[1:])]
    notices = [] if shared else ["The runs share no fact: each row is of the run's own facts."]
    tables = [_table(runs, rows, shared)]
    points = _points(runs, rows)
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
        notices=tuple(notices),
        tables=tuple(tables),
        figures=(_figure(runs[0].name, points),) if points else (),
    )


def _rows(run: RunFolder) -> dict[Key, Mapping[str, Any]]:
    """Each fact in the model: its row after the edit; the latest counts."""
    return {
        (line["id"], line["prompt"], line["target"]): after_row(line)
        for line in run.lines
        if line["after"] and line.get("active", True)
    }


def _measures(runs: Sequence[RunFolder]) -> list[str]:
    return measured(run.evaluated[-1]["after"] for run in runs)


def _table(
    runs: Sequence[RunFolder], rows: Sequence[Mapping[Key, Mapping[str, Any]]], shared: list[Key]
) -> StudyTable:
    """After the edits, on the shared facts; only these are a contest."""
    columns = [Column("run", "run"), Column("method", "method")]
    table: list[dict[str, Cell]] = [
        {"run": run.name, "method": str((run.recipe.get("method") or {}).get("name", ""))}
        for run in runs
    ]
    for name in _measures(runs):
        column = Column(**find(name).head())
        better = column.better if shared else None
        columns.append(Column(name, column.title, better, column.unit, column.digits))
        for row, held in zip(table, rows, strict=True):
            keys = shared or list(held)
            row[name] = _mean([held[key].get(name) for key in keys], find(name).scale)
    texts = {run.evaluated[-1]["text"] for run in runs}
    if len(texts) == 1 and any(perplexity(run.evaluated[-1]["after"]) for run in runs):
        columns.append(Column(**find("perplexity").head()))
        for row, run in zip(table, runs, strict=True):
            found = perplexity(run.evaluated[-1]["after"])
            row["perplexity"] = found and Value(found.mean, found.standard_error)
        moved = [kl(run.evaluated[-1]["after"]) for run in runs]
        if any(moved):
            columns += [Column(**find(name).head(short=True)) for name in ("kl", "kl_worst")]
            for row, told in zip(table, moved, strict=True):
                row["kl"] = told and Value(told[0].mean, told[0].standard_error)
                row["kl_worst"] = told and told[1]
    caption = f"After the edits, on the {len(shared)} facts that all share" if shared else ""
    return StudyTable("runs", "After the edits", caption, tuple(columns), tuple(table))


def _mean(found: Sequence[float | bool | None], scale: float) -> Value | None:
    values = [scale * float(v) for v in found if v is not None]
    if not values:
        return None
    rate = Rate.of(values)
    return Value(rate.mean, rate.standard_error if rate.n > 1 else None, rate.n)


def _points(
    runs: Sequence[RunFolder], rows: Sequence[Mapping[Key, Mapping[str, Any]]]
) -> list[Point]:
    """Each later run minus the first, per measure, on the facts that the two share."""
    points = []
    for run, held in zip(runs[1:], rows[1:], strict=True):
        keys = [key for key in rows[0] if key in held]
        for name in _measures(runs):
            if find(name).unit != "%":
                continue
            a, b = pairs([rows[0][key] for key in keys], [held[key] for key in keys], name)
            if a:
                mean, low, high = paired_bootstrap(a, b)
                points.append(
                    Point(
                        x=find(name).title,
                        y=mean,
                        n=len(a),
                        series=run.name,
                        low=low,
                        high=high,
                    )
                )
    return points


def _differences(runs: Sequence[RunFolder], points: Sequence[Point]) -> StudyTable:
    names = list(dict.fromkeys(str(p.x) for p in points))
    rows: list[dict[str, Cell]] = []
    for run in runs[1:]:
        mine = {str(p.x): p for p in points if p.series == run.name}
        if not mine:
            continue
        told: dict[str, Cell] = {name: _interval(p) for name, p in mine.items()}
        rows.append({"run": run.name, "facts": str(max(p.n or 0 for p in mine.values())), **told})
    return StudyTable(
        "differences",
        f"Difference from {runs[0].name}",
        "Percentage points, with the 95 % interval of a paired bootstrap over the facts that the "
        "two runs share",
        (Column("run", "run"), Column("facts", "facts"), *(Column(name, name) for name in names)),
        tuple(rows),
    )


def _interval(point: Point) -> str:
    mean, low, high = (signed(v or 0.0, 1) for v in (point.y, point.low, point.high))
    return f"{mean} [{low}, {high}]"


def _figure(first: str, points: Sequence[Point]) -> FigureSpec:
    return FigureSpec(
        name="differences",
        caption=f"Difference from {first} with 95 % intervals; hollow where the interval has 0.",
        kind="intervals",
        x="measure",
        y="difference",
        series="run",
        labels={"x": "", "y": f"difference from {first} (percentage points)"},
        points=tuple(points),
    )
