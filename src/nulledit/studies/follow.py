"""The one follower: runs the arms of a study along their streams and asks what is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nulledit.studies.context import Lab
from nulledit.studies.declaration import Part, others_than
from nulledit.studies.results import Along, Results, Spot
from nulledit.studies.stream import StreamPlan

SECONDS = {"own": ("keys", "solve"), "values": ("values",)}
"""Wall seconds per fact that a stream's last spot has, and the stages that they are of."""


def follow(lab: Lab, part: Part) -> Results | None:
    """A part's streams, each asked at its checkpoints; None if it has nothing to edit.

    What was edited or answered before is taken up.
    """
    ended = part.until(lab) if part.until else None
    made = part.prepare(lab)
    arms: list[Along] = []
    plans = part.plans(lab)
    for i, plan in enumerate(plans):
        if others_than(plan, plans[:i]):  # before the stream: it takes the model
            base = unedited(lab, part, plan)
        arms.append(list(_along(lab, part, plan, base, ended)))
    if part.arms and not arms:
        return None
    results = Results(lab, lab.title(part.source) if arms else "", tuple(arms), made)
    return replace(results, others=tuple(part.others(lab, results)))


def unedited(lab: Lab, part: Part, plan: StreamPlan) -> Spot:
    """The model without edits, asked about all of a stream's facts."""
    end = len(plan.facts)
    found = {q.name: q.answer(lab, plan, end) for q in part.asked if q.of_base}
    return Spot("unedited", found=_held(found), plan=plan)


def _along(
    lab: Lab, part: Part, plan: StreamPlan, base: Spot, ended: Callable[[Along], bool] | None
) -> Iterator[Spot]:
    """The stream at its checkpoints, edited to its end first or only as far as it is followed."""
    wanted = part.checkpoints(lab, plan)
    stream = lab.bench.stream(plan) if ended else lab.edited(plan)
    spots: list[Spot] = []
    for at in stream.batches(lab.staged(plan.label)) if ended else wanted:
        last = at == wanted[-1]
        asked = [q for q in part.asked if last or not q.last]
        found = _held({q.name: q.answer(lab, plan, at, stream) for q in asked})
        extra = {name: stream.seconds(*of) for name, of in SECONDS.items()} if last else {}
        spots.append(Spot(plan.label, at, found, base, plan, extra))
        yield spots[-1]
        if ended and ended(spots):
            break


def _held(found: dict[str, Any]) -> dict[str, Any]:
    return {name: answer for name, answer in found.items() if answer is not None}
