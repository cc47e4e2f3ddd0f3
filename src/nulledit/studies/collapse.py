"""Study of collapse: which signs warn of it, and how many edits before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nulledit.data.facts import Fact
from nulledit.report.points import Point
from nulledit.studies.build import along, head, lines
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Cells, Part, StudySpec, Table
from nulledit.studies.questions import NORMS, OWN_PROMPTS, TEXT
from nulledit.studies.results import Along, Results, Spot, divergence, growth, quantity
from nulledit.studies.scale import chosen
from nulledit.studies.signs import (
    AT_EDITS,
    ON_TEXT,
    ROOM,
    SIGNS,
    Bounds,
    room_left,
    thresholds_of,
    warnings_on,
)
from nulledit.studies.stream import StreamPlan


def _arms(lab: Lab, queue: list[Fact]) -> Iterator[StreamPlan]:
    """Each arm on records of its own: the first sets thresholds for the others."""
    start, used = lab.settings["skip"], set[Any]()
    for name in chosen(lab.settings):
        if used:
            queue = lab.facts(lab.settings["facts"], skip=start)
        queue = [fact for fact in queue if fact.key not in used]
        yield lab.plan(name, queue, label=f"{name}, from record {start}")
        used |= {fact.key for fact in queue}
        start += lab.settings["facts"]


def _warnings(results: Results) -> Iterator[dict[str, Any]]:
    """A row for each stream and sign; thresholds are the first stream's."""
    bounds = Bounds.of(results.lab.settings)
    thresholds = thresholds_of(results.arms[0], bounds)
    for i, spots in enumerate(results.arms):
        label = spots[0].label + ("" if i else " (sets the thresholds)")
        for row in warnings_on(spots, bounds, thresholds):
            yield {**row, "stream": label, "cause": bounds.cause(spots) or "no collapse"}


def _course(results: Results) -> Iterator[Cells]:
    bounds, (spots,) = Bounds.of(results.lab.settings), results.arms

    def state(spot: Spot) -> str:
        if spot is spots[-1] and bounds.cause(spots):
            return "collapsed"
        return "well" if bounds.well(spots, spot) else ""

    yield Cells(head("edits", "edits", "", 0), lambda spot: str(spot.at))
    for n in spots[0].found["room"]:
        yield Cells(head(f"room{n}", f"room, layer {n}"), lambda spot, n=n: room_left(spot, n))  # type: ignore[misc]
    yield from (Cells(head(sign.name, sign.title), sign.quantity) for sign in SIGNS[1:])
    yield Cells(head("strict", "strict, all"), quantity("efficacy_strict"))
    yield Cells(head("oldest", "strict, oldest"), bounds.held)
    yield Cells(head("perplexity", "perplexity growth"), growth)
    yield Cells(head("kl", "KL per token", "mnat"), divergence)
    yield Cells(head("state", "state", ""), state)


def _outcomes(results: Results) -> Iterable[Point]:
    held, strict = Bounds.of(results.lab.settings).held, quantity("efficacy_strict")
    panels = {"strict, all": strict, "strict, oldest": held, "perplexity growth": growth}
    return along(panels)(results)


def _shows(results: Results) -> str:
    bounds, rows = Bounds.of(results.lab.settings), list(_warnings(results))
    told = []
    for i, spots in enumerate(results.arms):
        label, last, cause = spots[0].label, spots[-1].at, bounds.cause(spots)
        ended = f"collapsed at {last} edits ({cause})" if cause else f"held for {last} edits"
        if not cause:
            results.lab.notices.append(
                f"{label}: had not collapsed after {last} edits, where its facts ran out."
            )
        warned = [
            f"{row['signal']} at {row['crossed']}"
            + ("" if row["before"] is None else f", {row['before']} edits before")
            for row in rows[i * len(SIGNS) : (i + 1) * len(SIGNS)]
            if row["crossed"] is not None
        ]
        past = f"; past the first stream's thresholds: {'; '.join(warned) or 'no sign'}"
        told.append(
            f"{label} {ended}{past if i else '' if cause else ', so it sets no threshold'}."
        )
    return " ".join(told)


def _until(lab: Lab) -> Callable[[Along], bool]:
    bounds = Bounds.of(lab.settings)
    return lambda along: bool(bounds.cause(along))


COLLAPSE = StudySpec(
    name="collapse",
    title="Signs before a collapse",
    question="Which sign says that a stream of edits will ruin the model, and how many edits "
    "before it does?",
    needs=("facts", "text"),
    cannot_show="Thresholds come from one stream of one model and setting; where streams collapse "
    "for another reason (long values, another method), a sign may come late or never. Edits are "
    "counted at checkpoints, a batch apart.",
    parts=(
        Part(
            _arms,
            asked=(OWN_PROMPTS, AT_EDITS, ON_TEXT, NORMS, ROOM, TEXT),
            tables=(
                Table(
                    "warnings",
                    "How early each sign warns",
                    "Collapse: the first checkpoint at which perplexity had grown by {growth:g} % "
                    "or the oldest cohort had lost {loss:g} % of the strict efficacy it began "
                    "with. A threshold is the sign's value at the last checkpoint at which the "
                    "first stream was well (perplexity less than {healthy_growth:g} % up, the "
                    "oldest less than {healthy_loss:g} % down); the other streams, each on "
                    "records of its own, judge it. Edits are counted at checkpoints; 0 before "
                    "means that it came with the collapse.",
                    (
                        head("stream", "stream", ""),
                        head("signal", "sign", ""),
                        head("threshold", "threshold"),
                        head("crossed", "crossed at", "", 0),
                        head("collapsed", "collapse at", "", 0),
                        head("before", "edits before", "", 0),
                        head("cause", "what had happened", ""),
                    ),
                    rows=_warnings,
                ),
                Table(
                    "stream",
                    "{arm}",
                    "After each batch. Room: share of a layer's usable directions that no edit "
                    "has taken; ‖Δ‖/‖W₀‖ of the layer where it is largest; growth of ‖h‖ after "
                    "the last edited block, at the subjects of all facts so far and at the ends "
                    "of pieces of other text.",
                    (_course,),
                    rows=lambda results: results.arms[0],
                    each_arm=True,
                ),
            ),
            figures=(
                lines(
                    "signs",
                    "Signs along each stream; streams end where they collapse.",
                    "%",
                    along({sign.title: sign.quantity for sign in SIGNS}),
                    series="stream",
                    panel="sign",
                ),
                lines(
                    "outcomes",
                    "Outcomes along each stream; bars: one standard error over facts. Collapse: "
                    "{growth:g} % more perplexity, or {loss:g} % of the oldest lost.",
                    "%",
                    _outcomes,
                    series="stream",
                    panel="outcome",
                ),
            ),
            shows=_shows,
            until=_until,
        ),
    ),
)
