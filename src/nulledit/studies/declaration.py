"""What a study is: data that the follower runs and the builder makes tables and figures of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nulledit.data.facts import Fact
from nulledit.report.document import Column, FigureSpec
from nulledit.report.points import Point
from nulledit.studies.context import Lab, Sources
from nulledit.studies.questions import EVERYTHING, Question
from nulledit.studies.results import Along, Results, Spot, Work
from nulledit.studies.scale import Scale, chosen
from nulledit.studies.stream import StreamPlan

Arms = Callable[[Lab, list[Fact]], Iterable[StreamPlan]]
"""The streams of a queue; one may have records of its own."""


@dataclass(frozen=True)
class Cells:
    """A column: its head, and what a row has in it."""

    head: Column
    """Key, title, unit."""
    cell: Callable[[Any], Any]
    """Row to a quantity, a text or None."""


Columns = str | Column | Cells | Callable[[Results], Iterable[Any]]
"""A measure of the catalogue, of rows that are spots, left out where no row has it; a key of rows
that are mappings; a column; or a function that gives some of these of what was found."""


@dataclass(frozen=True)
class Table:
    """A table; titles and captions may name settings, {edits}, {data} and {arm}."""

    name: str
    """For links."""
    title: str
    caption: str
    columns: Sequence[Columns]
    """The first one names the rows."""
    rows: Callable[[Results], Iterable[Any]] = lambda results: results.rows
    """Spots or mappings: the unedited model and each arm at its end."""
    each_arm: bool = False
    """Whether each arm has a table of its own, with its number in the name."""


@dataclass(frozen=True)
class Figure:
    """A figure; one without points is left out."""

    spec: FigureSpec
    """All but the points; the caption as a table's."""
    points: Callable[[Results], Iterable[Point]]


@dataclass(frozen=True)
class Part:
    """Streams of one queue (or none), what they are asked, and what is shown of it."""

    arms: Arms | None = None
    """The streams that are compared; None: the part edits nothing."""
    asked: tuple[Question, ...] = EVERYTHING
    """At each checkpoint."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    shows: Callable[[Results], str] = lambda results: ""
    """What the numbers show, made from them."""
    source: str = "facts"
    """Whose records are the queue; the setting of that name is their number, 0: no part."""
    along: bool = False
    """Whether it is asked every `ask_every` facts or where listed, not only at the end."""
    until: Callable[[Lab], Callable[[Along], bool]] | None = None
    """Whether a stream, asked after each batch, ends there; ConfigError for bad settings."""
    examples: bool = True
    """Whether a few of the answers are shown as examples."""
    others: Callable[[Lab, Results], Iterable[Spot]] = lambda lab, results: ()
    """Models that are no edit, asked about the same queue."""
    prepare: Callable[[Lab], Any] = lambda lab: None
    """Anything to make before the streams."""
    more: Callable[[Lab], Mapping[str, int]] = lambda lab: {}
    """Fields of `Work` that the questions don't count."""

    def plans(self, lab: Lab) -> list[StreamPlan]:
        """The streams; none without facts to edit."""
        count = lab.settings[self.source] if self.arms else 0
        if self.arms is None or not count:
            return []
        if getattr(lab.sources, self.source) is None:
            notice = f"No --{self.source} was given, so what needs it is absent."
            lab.notices += [notice] if notice not in lab.notices else []
            return []
        queue = lab.facts(count, source=self.source, skip=lab.settings["skip"])
        return list(self.arms(lab, queue))

    def checkpoints(self, lab: Lab, plan: StreamPlan) -> list[int]:
        """Where a stream is asked."""
        end, every = len(plan.facts), lab.settings.get("ask_every", 1)
        if self.until:
            return plan.checkpoints()[1:]
        if not self.along:
            return [end]
        wanted = range(every, end + 1, every) if isinstance(every, int) else every
        return [at for at in plan.checkpoints()[1:] if at in wanted or at == end]

    def work(self, lab: Lab) -> tuple[list[StreamPlan], Counter[str]]:
        """The streams, and what they are asked, by field of `Work`."""
        if self.until:
            self.until(lab)
        plans, told = self.plans(lab), Counter[str]()
        for i, plan in enumerate(plans):
            spots = self.checkpoints(lab, plan)
            for question in self.asked:
                times = spots[-1:] if question.last else spots
                if question.of_base and others_than(plan, plans[:i]):
                    times = [*times, spots[-1]]
                for at in times:
                    if facts := question.about(lab, plan.facts[:at]):
                        told.update(question.work(len(facts)))
        told.update(self.more(lab) if plans else {})
        return plans, told


@dataclass(frozen=True)
class StudySpec:
    """A study: what it asks, what it needs, its parts, and how its numbers are read."""

    name: str
    """On the command line."""
    title: str
    question: str
    """One sentence."""
    needs: tuple[str, ...]
    """Sources without which it can't run."""
    cannot_show: str
    """What its numbers can't say."""
    parts: tuple[Part, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings where a scale has none for it: `facts`, `skip`, `batch_size`, `arms`, ..."""

    def check(self, sources: Sources) -> None:
        """ConfigError if a source that it needs is missing."""
        for name in self.needs:
            sources.need(name)

    def scaled(self, scale: Scale) -> Scale:
        """`scale` with the study's own settings, if it has none for it."""
        if not self.settings or self.name in scale.studies:
            return scale
        return Scale(scale.name, scale.arms, {**scale.studies, self.name: self.settings})

    def work(self, lab: Lab) -> Work:
        """What it will do."""
        plans: list[StreamPlan] = []
        told = Counter[str]()
        for part in self.parts:
            of_part, counted = part.work(lab)
            plans += of_part
            told.update(counted)
        return Work(plans, **told)


def others_than(plan: StreamPlan, before: Sequence[StreamPlan]) -> bool:
    """Whether a stream has other facts than the one before: the unedited model is asked again."""
    return not before or {f.id for f in plan.facts} != {f.id for f in before[-1].facts}


def named(setting: str = "arms", *, only: int | None = None) -> Arms:
    """The scale's arms that a setting names, or the first of them."""
    return lambda lab, queue: [
        lab.plan(name, queue) for name in chosen(lab.settings, setting)[:only]
    ]
