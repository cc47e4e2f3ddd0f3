"""What a study is: data that the follower runs and the builder makes tables and figures of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from nulledit.data.facts import Fact
from nulledit.report.document import Column, FigureSpec
from nulledit.report.points import Point
from nulledit.studies.context import Lab, Sources
from nulledit.studies.questions import EVERYTHING, Question
from nulledit.studies.results import Arm, Results, Spot, Work
from nulledit.studies.scale import Scale, chosen
from nulledit.studies.stream import StreamPlan

Text = str | Callable[[Results], str]
"""A text with {settings}, {edits}, {data} and {arm}, or a function that makes it."""
Arms = Callable[[Lab], Iterable[Arm]]
Points = Callable[[Results], Iterable[Point]]


@dataclass(frozen=True)
class Cells:
    """A column: its head, and what a row has in it."""

    head: Column
    """Key, title, unit."""
    cell: Callable[[Any], Any]
    """Row to a quantity, a text or None."""


Columns = str | Column | Cells | Callable[[Results], Iterable[Any]]
"""A measure of the catalogue, of rows that are spots; a key of rows that are mappings; a column;
or a function that gives some of these, for columns that depend on what was found."""


@dataclass(frozen=True)
class Table:
    """A table; a column that no row has anything in is left out."""

    name: str
    """For links."""
    title: Text
    """Its heading."""
    caption: Text
    """What the numbers are of."""
    columns: Sequence[Columns]
    """After the one that names the rows."""
    names: str | Cells | Column = "method"
    """The first column: the head of the rows' labels, or a column of its own."""
    rows: Callable[[Results], Iterable[Any]] = lambda results: results.rows
    """Spots or mappings: the unedited model and each arm at its end."""
    digits: Mapping[str, int] = field(default_factory=dict)
    """Measure -> digits that are shown, where they are not the catalogue's."""
    each_arm: bool = False
    """Whether each arm has a table of its own, with its number in the name."""


@dataclass(frozen=True)
class Figure:
    """A figure; one without points is left out."""

    spec: FigureSpec
    """All but the points; the caption is a text as a table's."""
    points: Points
    """Its data."""
    caption: Text = ""
    """Instead of the specification's."""


@dataclass(frozen=True)
class Part:
    """Streams of one queue (or none), what they are asked, and what is shown of it."""

    arms: Arms | None = None
    """The streams that are compared; None: the part edits nothing."""
    asked: tuple[Question, ...] = EVERYTHING
    """At each checkpoint."""
    tables: Sequence[Table] = ()
    """Numbers."""
    figures: Sequence[Figure] = ()
    """The same to look at."""
    shows: Callable[[Results], str] = lambda results: ""
    """What the numbers show, made from them."""
    source: str = "facts"
    """Whose records are the queue; the setting of that name is their number, 0: no part."""
    missing: str = ""
    """Notice where the source is not given; empty: the study needs it."""
    along: bool = False
    """Whether it is asked every `ask_every` facts or where listed, not only at the end."""
    one_batch: bool = False
    """Whether the whole queue is solved together, whatever `batch_size` says."""
    own_records: bool = False
    """Whether each arm has records of its own, and the unedited model is asked about each."""
    until: Callable[[Lab], Callable[[Sequence[Spot]], bool]] | None = None
    """Whether a stream ends behind its spots so far; such a stream is asked after each batch."""
    others: Callable[[Lab, Results], Iterable[Spot]] = lambda lab, results: ()
    """Models that are no edit, asked about the same queue."""
    prepare: Callable[[Lab], Any] = lambda lab: None
    """Anything to make before the streams."""
    more: Callable[[Lab], Mapping[str, float]] = lambda lab: {}
    """Fields of `Work` that the questions don't count."""

    def wanted(self, lab: Lab) -> bool:
        """Whether there is anything to edit, with a notice where a file is missing."""
        if self.arms is None:
            return True
        if lab.settings[self.source] and self.missing and not getattr(lab.sources, self.source):
            lab.notices += [self.missing] if self.missing not in lab.notices else []
            return False
        return bool(lab.settings[self.source])

    def plans(self, lab: Lab) -> list[tuple[Arm, StreamPlan]]:
        """The arms and their streams."""
        if self.arms is None or not self.wanted(lab):
            return []
        count, skip = lab.settings[self.source], lab.settings["skip"]
        queue = lab.facts(count, source=self.source, skip=skip)
        found: list[tuple[Arm, StreamPlan]] = []
        for i, arm in enumerate(self.arms(lab)):
            if self.own_records and i:
                used = {fact.key for _, plan in found for fact in plan.facts}
                queue = lab.facts(count, source=self.source, skip=skip + i * count)
                queue = [fact for fact in queue if fact.key not in used]
            found.append((arm, self._plan(lab, arm, queue)))
        return found

    def checkpoints(self, lab: Lab, plan: StreamPlan) -> list[int]:
        """Where a stream is asked."""
        end = len(plan.facts)
        if self.until:
            return plan.checkpoints()[1:]
        if not self.along:
            return [end]
        every = lab.settings.get("ask_every", 1)
        wanted = every if isinstance(every, list) else range(every, end + 1, every)
        return [at for at in plan.checkpoints()[1:] if at in wanted or at == end]

    def work(self, lab: Lab) -> tuple[list[StreamPlan], Counter[str]]:
        """The streams, and what they are asked, by field of `Work`."""
        plans = [plan for _, plan in self.plans(lab)]
        told: Counter[str] = Counter(self.more(lab) if self.arms is None or plans else {})
        for i, plan in enumerate(plans):
            spots = self.checkpoints(lab, plan)
            for question in self.asked:
                times = spots[-1:] if question.last or question.before else spots
                unedited = question.of_base and (self.own_records or i == 0)
                for at in [*times, *(spots[-1:] if unedited else [])]:
                    if facts := question.facts(lab, plan.facts[:at]):
                        told.update(question.work(len(facts)))
        return plans, told

    def _plan(self, lab: Lab, arm: Arm, queue: Sequence[Fact]) -> StreamPlan:
        size = len(queue) if self.one_batch else arm.batch_size or lab.settings["batch_size"]
        facts = sorted(queue, key=arm.order) if arm.order else queue
        given = {"label": arm.label, "batch_size": size, "statistics": arm.statistics}
        return lab.plan(arm.recipe, facts, **given)


@dataclass(frozen=True)
class StudySpec:
    """A study: what it asks, what it needs, its parts, and how its numbers are read."""

    name: str
    """On the command line."""
    title: str
    """Heading."""
    question: str
    """One sentence."""
    needs: tuple[str, ...]
    """Sources without which it can't run."""
    cannot_show: str
    """What its numbers can't say."""
    parts: tuple[Part, ...]
    """Streams, tables and figures."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings where a scale has none for it: `facts`, `skip`, `batch_size`, `arms`, ..."""
    valid: Callable[[Mapping[str, Any]], Any] = lambda settings: None
    """Raises ConfigError for settings of its own that can't be."""

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
        self.valid(lab.settings)
        plans: list[StreamPlan] = []
        told: Counter[str] = Counter()
        for part in self.parts:
            of_part, counted = part.work(lab)
            plans += of_part
            told.update(counted)
        return Work(plans, **told)


# -- arms ----------------------------------------------------------------------------------------


def named(setting: str = "arms", *, numbered: bool = False, only: int | None = None) -> Arms:
    """The scale's arms that a setting names; `numbered`: labels say where records begin."""

    def arms(lab: Lab) -> Iterable[Arm]:
        for i, name in enumerate(chosen(lab.settings, setting)[:only]):
            start = f", from record {lab.settings['skip'] + i * lab.settings['facts']}"
            yield Arm(name + (start if numbered else ""), name)

    return arms


def fixed(arms: Mapping[str, Mapping[str, Any]]) -> Arms:
    """Label -> changes of the base recipe."""
    return lambda lab: [Arm(label, changes) for label, changes in arms.items()]


def swept(setting: str, field: str, arms: Mapping[str, Mapping[str, Any]]) -> Arms:
    """For each value of a setting: label with {} -> changes of the base recipe, and `field`."""
    return lambda lab: [
        Arm(label.format(value), {**changes, field: value})
        for value in lab.settings[setting]
        for label, changes in arms.items()
    ]


def both(*arms: Arms) -> Arms:
    """One after the other."""
    return lambda lab: list(chain.from_iterable(some(lab) for some in arms))
