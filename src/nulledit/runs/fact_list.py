"""Every fact of a run in one list, and what its reader can choose by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nulledit.io.text import shorten
from nulledit.report.document import Cell, Choice, Column, Listing, Status, StudyTable
from nulledit.runs.holding import MARKS, held, legend, mark, neighbour_moved, reasons, tone

Line = Mapping[str, Any]
"""One of `results.jsonl`."""
LONGEST = 300  # columns of a text in a cell
MOST_CHOICES = 40  # of one kind; what is rarer is chosen together
SHARES = (
    "Paraphrases and neighbours: the share answered as they should be, every token the likeliest; "
    "of neighbours before and after"
)
HEADS = {
    "prompt": "fact",
    "target": "target",
    "before": "before",
    "after": "after",
    "mark": "holds",
    "paraphrases": "paraphrases",
    "neighbours": "neighbours",
}


def fact_list(lines: Sequence[Line], *, folder: str = "RUN") -> Listing:
    """All `lines`, with the marks, changed neighbours, relations and calls that they have to choose
    by. `folder`: the run's, in what to do next."""
    why = dict(reasons(lines, folder))
    rows = [_row(line, why.get(line["id"], "")) for line in lines]
    kept = [key for key in HEADS if any(row[key] for row in rows)]
    columns = tuple(Column(key, HEADS[key]) for key in kept)
    said = [legend(list(filter(_active, lines)))]
    if {"paraphrases", "neighbours"} & set(kept):
        said.append(SHARES)
    table = StudyTable(
        "facts",
        "Every fact",
        ". ".join(filter(None, said)),
        columns,
        tuple({key: row[key] for key in kept} for row in rows),
    )
    return Listing(table, tuple(_choices(lines)))


def by_value(
    title: str, values: Sequence[str], named: Callable[[str], str] = str
) -> tuple[str, tuple[Choice, ...]] | None:
    """A choice by the value that each row has, the most frequent first; None if all have one."""
    counts = Counter(values)
    if len(counts) < 2:
        return None
    common = [value for value, _ in counts.most_common(MOST_CHOICES)]
    choices = [Choice(named(value), _where(values, {value})) for value in common]
    if rest := set(counts) - set(common):
        choices.append(Choice("others", _where(values, rest)))
    return title, (Choice("any"), *choices)


def _choices(lines: Sequence[Line]) -> list[tuple[str, tuple[Choice, ...]]]:
    marks = [mark(line) if _active(line) else "" for line in lines]
    good = [_active(line) and line["after"] is not None and held(line) for line in lines]
    bad = [m not in ("", "not evaluated") and not g for m, g in zip(marks, good, strict=True)]
    there = _where(marks, set(marks) - {""})
    all_there = len(there) == len(lines)
    shown = [Choice("all") if all_there else Choice("in the model", there)]
    split = (("hold", good), ("do not hold", bad))
    shown += [Choice(name, rows) for name, are in split if (rows := _where(are, {True})) != there]
    known = {there, *(choice.rows for choice in shown)}
    kinds = [Choice(name, _where(marks, {name})) for name in MARKS if name in marks]
    shown += [choice for choice in kinds if choice.rows not in known]
    for name, value in (("not evaluated", "not evaluated"), ("taken out", "")):
        if value in marks:
            shown.append(Choice(name, _where(marks, {value})))
    shown = [choice for choice in shown if choice.rows is None or choice.rows]
    found = [("Show", tuple(shown))] if len(shown) > 1 else []
    moved = [bool(neighbour_moved(line)) for line in lines]
    if any(moved):
        found.append(("Neighbours", (Choice("any"), Choice("changed", _where(moved, {True})))))
    calls = by_value("Written by", [f"run {line['run']}" for line in lines])
    relations = by_value("Relation", [line.get("relation") or "none" for line in lines])
    return [*found, *filter(None, (calls, relations))]


def _row(line: Line, why: str) -> dict[str, Cell]:
    before, after = line["before"] or {}, line["after"] or {}
    gone = not _active(line)
    about = " · ".join(filter(None, (line["id"], line.get("relation"))))
    said = Status("taken out") if gone else Status(mark(line), tone(line), why)
    return {
        "prompt": Status(shorten(line["prompt"], LONGEST), "", about),
        "target": shorten(line["target"], LONGEST),
        "before": shorten(str(before.get("answer") or ""), LONGEST),
        "after": shorten(str(after.get("answer") or ""), LONGEST),
        "mark": said,
        "paraphrases": _share(after.get("generalization_strict")),
        "neighbours": _neighbours(line),
    }


def _neighbours(line: Line) -> Cell:
    before, after = line["before"] or {}, line["after"] or {}
    then, now = (_share(side.get("specificity_strict")) for side in (before, after))
    text = now if then in ("", now) else f"{then}\u00a0→\u00a0{now}"
    said = []
    for what, probes in (line.get("neighbours") or {}).items():
        if probes:
            said.append(f"{what}: " + "; ".join(f"{p} … {answer}" for p, answer in probes))
    return Status(text, "weak" if neighbour_moved(line) else "", shorten(". ".join(said), LONGEST))


def _active(line: Line) -> bool:
    return bool(line.get("active", True))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}\u00a0%"


def _where(values: Sequence[Any], wanted: set[Any]) -> tuple[int, ...]:
    return tuple(i for i, value in enumerate(values) if value in wanted)
