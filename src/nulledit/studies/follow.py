"""The one follower: runs the arms of a study along their streams and asks what is declared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nulledit.report.document import Example, FigureSpec, StudyTable
from nulledit.studies import build
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Part, StudySpec
from nulledit.studies.results import Arm, Followed, Results, Spot
from nulledit.studies.stream import StreamPlan


@dataclass
class Outcome:
    """What a study came to."""

    shows: str = ""
    """What the numbers show, made from them."""
    tables: list[StudyTable] = field(default_factory=list)
    """Numbers."""
    figures: list[FigureSpec] = field(default_factory=list)
    """The same to look at."""
    examples: list[Example] = field(default_factory=list)
    """Generated text."""


def run(spec: StudySpec, lab: Lab) -> Outcome:
    """Run every part; what was edited or answered before is taken up."""
    spec.valid(lab.settings)
    outcome, told = Outcome(), []
    for part in spec.parts:
        results = follow(lab, part)
        if results is None:
            continue
        outcome.tables += build.tables(results, part)
        outcome.figures += build.figures(results, part)
        outcome.examples += build.examples(results)
        told.append(part.shows(results))
    outcome.shows = " ".join(filter(None, told))
    return outcome


def follow(lab: Lab, part: Part) -> Results | None:
    """A part's streams, each asked at its checkpoints; None if it has nothing to edit."""
    if not part.wanted(lab):
        return None
    made = part.prepare(lab)
    arms: list[Followed] = []
    base: Spot | None = None
    for arm, plan in part.plans(lab):
        if base is None or part.own_records:  # before the stream: it takes the model
            base = unedited(lab, part, plan)
        arms.append(Followed(arm, plan, tuple(_along(lab, part, arm, plan, base))))
    first = arms[0].spots[0].base if arms else None
    title = lab.title(part.source) if arms else ""
    results = Results(lab, title, first, tuple(arms), made=made)
    return replace(results, others=tuple(part.others(lab, results)))


def unedited(lab: Lab, part: Part, plan: StreamPlan) -> Spot:
    """The model without edits, asked about all of a stream's facts."""
    end = len(plan.facts)
    found = {q.name: q.answer(lab, plan, end) for q in part.asked if q.of_base}
    return Spot("unedited", found=_held(found), plan=plan)


def _along(lab: Lab, part: Part, arm: Arm, plan: StreamPlan, base: Spot) -> Iterator[Spot]:
    """The stream at its checkpoints, edited to its end first or only as far as it is followed."""
    wanted = part.checkpoints(lab, plan)
    ended = part.until(lab) if part.until else None
    stream = lab.bench.stream(plan) if ended else lab.edited(plan)
    spots: list[Spot] = []
    for at in stream.batches(lab.staged(plan.label)) if ended else wanted:
        last = at == wanted[-1]
        asked = [q for q in part.asked if last or not (q.last or q.before)]
        found = {q.name: q.answer(lab, plan, at, stream) for q in asked}
        extra: dict[str, Any] = {}
        if last:
            extra = {name: stream.seconds(*of) for name, of in SECONDS.items()}
        spots.append(Spot(plan.label, at, _held(found), base, plan, extra))
        yield spots[-1]
        if ended and ended(spots):
            break


SECONDS = {"own": ("keys", "solve"), "values": ("values",)}
"""Wall seconds per fact that a stream's last spot has, and the stages that they are of."""


def _held(found: dict[str, Any]) -> dict[str, Any]:
    return {name: answer for name, answer in found.items() if answer is not None}
