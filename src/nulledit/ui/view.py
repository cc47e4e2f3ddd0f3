"""What pages show of a run, read from its folder: no model, and always what is on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulledit.config import Recipe, read_recipe
from nulledit.errors import LedgerError
from nulledit.evaluation.measures import find
from nulledit.ledger.records import Column, History
from nulledit.ledger.store import Store
from nulledit.report.document import FigureSpec
from nulledit.report.points import Point
from nulledit.runs.document import RunFolder
from nulledit.runs.folder import read_lines, read_run
from nulledit.runs.history import answer_of, events_of, story_of
from nulledit.runs.holding import held, mark, reasons, tone
from nulledit.runs.tables import of_text

OUT = "taken out"
SORTS = ("order", "id", "subject", "prompt", "target", "says", "mark", "batch")
"""Columns that a table of facts can be sorted by; `order` is that of the ledger."""
SHOWS = ("in the model", "holds", "does not hold", "not evaluated", "taken out", "all")
PAGE = 100  # facts on one page


@dataclass(frozen=True)
class FactRow:
    """One fact in the table."""

    id: str
    subject: str
    prompt: str
    target: str
    old_answer: str
    says: str
    """The edited model's own words when it was evaluated."""
    mark: str
    """One of `MARKS`, `not evaluated` or `taken out`."""
    tone: str
    holds: bool
    why: str
    """Why it does not hold, and what helps."""
    paraphrases: str
    """How many of them are answered by the target, token for token."""
    neighbours: str
    """How many of them say their own answer, before and after."""
    batch: int

    @property
    def active(self) -> bool:
        """Whether it is in the model."""
        return self.mark != OUT


class View:
    """The folder of a run, which may not be there yet."""

    def __init__(self, folder: Path):
        """`folder`: of the run."""
        self.folder = folder
        self.store = Store(folder / "ledger")

    def history(self) -> History | None:
        """The ledger without its tensors; None before the first batch."""
        return self.store.read() if self.store.exists else None

    def recipe(self) -> Recipe:
        """What facts are written by; the shipped default before the first batch, and where the
        ledger is damaged, which the jobs say."""
        with suppress(LedgerError):
            history = self.history()
            if history and history.epochs:
                return history.epoch.recipe
        return read_recipe(None, "")

    def pages(self) -> RunFolder | None:
        """The run's pages; None where none was written."""
        there = all((self.folder / f).is_file() for f in ("summary.json", "results.jsonl"))
        return read_run(self.folder, self.folder.name) if there else None

    def facts(self, asked: Mapping[int, Mapping[str, Any]] | None = None) -> list[FactRow]:
        """Those in the model, then those that were taken out.

        `asked`: lines of those that were evaluated once more since their edit, by column.
        """
        history = self.history()
        if history is None:
            return []
        lines = {line["column"]: line for line in read_lines(self.folder)} | dict(asked or {})
        there = {c.fact.id for c in history.active}
        gone = {c.fact.id: c for c in history.columns if c.fact.id not in there}
        return [
            *(_row(c, lines.get(c.id)) for c in history.present),
            *(_row(c, lines.get(c.id), out=True) for c in gone.values()),
        ]

    def story(self, id_: str) -> dict[str, Any]:
        """All that is known of one fact; LedgerError if there is none of that id."""
        return story_of(self.store.load(), id_)

    def events(self) -> list[dict[str, Any]]:
        """Every event, with KL and rates where what it wrote was evaluated; oldest first."""
        history, pages = self.history(), self.pages()
        events = events_of(history) if history else []
        calls = pages.evaluated if pages else []
        by_batch = {call["batches"][1]: call for call in calls if call["batches"]}
        for event in events:
            made = [batch for batch in event["batches"] if batch in by_batch]
            call = by_batch.pop(made[-1]) if made else None  # later events bring batches back
            event["kl"] = of_text(call["after"], "kl") if call else None
            event["says"] = (call["after"] or {}).get("generation") if call else None
        return events


def chosen(
    rows: Sequence[FactRow],
    *,
    q: str = "",
    show: str = SHOWS[0],
    sort: str = "",
    down: bool = False,
) -> list[FactRow]:
    """The rows that hold every word of `q`, in one of `SHOWS`, in the order of one of `SORTS`."""
    words = q.casefold().split()
    found = [row for row in rows if _shown(row, show) and all(word in _text(row) for word in words)]
    if sort in SORTS[1:]:
        found.sort(key=lambda row: _key(getattr(row, sort)), reverse=down)
    elif down:
        found.reverse()
    return found


def _shown(row: FactRow, show: str) -> bool:
    if show == "all":
        return True
    if not row.active:
        return show == OUT
    told = row.mark != "not evaluated"
    return {
        "holds": row.holds,
        "does not hold": told and not row.holds,
        "not evaluated": not told,
        OUT: False,
    }.get(show, True)


def _text(row: FactRow) -> str:
    parts = (row.id, row.subject, row.prompt, row.target, row.says, row.mark, row.why)
    return "\n".join(parts).casefold()


def _key(value: str | int) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value.casefold())


def curves(events: Sequence[Mapping[str, Any]]) -> list[FigureSpec]:
    """KL and what is said, along the events that were evaluated, where it varies."""
    found = []
    for name, key, about in (
        ("kl", "kl", "KL per token from the base on other text"),
        ("says", "generation", "Facts of each evaluated event that are said in generation"),
    ):
        measure = find(key)
        points = tuple(
            Point(x=event["event"], y=y, error=error, n=n, series="edited")
            for event in events
            if event[name] is not None
            for y, error, n in [_estimate(event[name], measure.scale if name == "says" else 1)]
        )
        if len({point.y for point in points}) > 1:  # what stays the same needs no curve
            found.append(
                FigureSpec(
                    name=f"along-{name}",
                    caption=f"{about}, after each event that was evaluated. Bars: standard error.",
                    kind="lines",
                    x="event",
                    y=measure.title,
                    labels={"x": "event", "y": measure.label},
                    points=points,
                )
            )
    return found


def _estimate(found: Any, scale: float) -> tuple[float | None, float | None, int | None]:
    given = found if isinstance(found, Mapping) else vars(found)
    mean, error = (
        None if given[k] is None else scale * given[k] for k in ("mean", "standard_error")
    )
    return mean, error, given["n"]


def _row(column: Column, line: Mapping[str, Any] | None, *, out: bool = False) -> FactRow:
    fact = column.fact
    told = line is not None and line["after"] is not None
    before, after = ((line or {}).get(side) or {} for side in ("before", "after"))
    why = dict(reasons([line])).get(fact.id, "") if line and told and not out else ""
    answered = sum(probe.answer is not None for probe in fact.neighbours)
    return FactRow(
        id=fact.id,
        subject=fact.subject,
        prompt=fact.render(fact.prompt),
        target=answer_of(fact),
        old_answer=fact.old_answer or "",
        says=str(after.get("answer") or ""),
        mark=OUT if out else mark(line) if line else "not evaluated",
        tone="" if out or line is None else tone(line),
        holds=bool(line and told and held(line)) and not out,
        why=why,
        paraphrases=_of(after.get("generalization_strict"), len(fact.paraphrases)),
        neighbours=_moved(before, after, answered),
        batch=column.batch,
    )


def _of(share: float | None, n: int) -> str:
    return "" if share is None or not n else f"{round(share * n)} of {n}"


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], n: int) -> str:
    now = _of(after.get("specificity_strict"), n)
    then = before.get("specificity_strict")
    return now if not now or then is None else f"{round(then * n)} → {now}"
