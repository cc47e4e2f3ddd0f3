"""Study of collapse: which signs warn of it, and how many edits before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nulledit.editing.editor import Editor
from nulledit.errors import ConfigError
from nulledit.evaluation.hidden_norms import edit_rows, norm_growth, state_norms, text_rows
from nulledit.evaluation.stats import Rate
from nulledit.report.points import Point
from nulledit.studies.build import along, head, lines
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.declaration import Cells, Part, StudySpec, Table, named
from nulledit.studies.questions import NORMS, OWN_PROMPTS, TEXT, Facts, Question
from nulledit.studies.results import (
    Followed,
    Quantity,
    Results,
    Spot,
    divergence,
    growth,
    number,
    quantity,
    rate,
    update_share,
)
from nulledit.studies.stream import StreamPlan

# -- what is asked -------------------------------------------------------------------------------

TokenRows = Sequence[Sequence[int]]


def _norms_at(name: str, rows_of: Callable[[Lab, Facts], TokenRows]) -> Question:
    """‖h‖ after the last edited block at the ends of rows of tokens."""

    def decides(lab: Lab, plan: StreamPlan, facts: Facts) -> Mapping[str, Any]:
        rows = [list(row) for row in rows_of(lab, facts)]
        return {"rows": hash_of(rows), "layer": plan.recipe.layers[-1]}

    def ask(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
        return state_norms(editor.editable, rows_of(lab, facts), plan.recipe.layers[-1]).tolist()

    return Question(name, decides, ask, kept_as="norm")


def _room(lab: Lab, plan: StreamPlan, facts: Facts, editor: Editor) -> Any:
    """Share of each layer's usable directions that no edit has taken.

    Room is of the whole ledger, so a checkpoint before its end has none: it is asked after each
    batch, and only missing where an interruption came just between the two.
    """
    at_end = len(editor.facts) == len(facts)
    return {str(r.layer): r.room if at_end else None for r in editor.weights.reports()}


AT_EDITS = _norms_at("norm at edits", lambda lab, facts: edit_rows(lab.bench.model, facts))
ON_TEXT = _norms_at("norm on text", lambda lab, facts: text_rows(lab.windows()))
ROOM = Question("room", lambda lab, plan, facts: {}, _room, of_base=False)


def _grown(question: Question) -> Quantity:
    """Growth of ‖h‖ since the unedited model."""

    def growth_of_norms(spot: Spot) -> Rate | None:
        if spot.base is None:
            return None
        now = [math.nan if v is None else v for v in spot.found[question.name]]
        before = spot.base.found[question.name][: len(now)]
        return norm_growth(torch.tensor(before), torch.tensor(now))

    return growth_of_norms


def _room_left(spot: Spot) -> float | None:
    held = [value for value in spot.found["room"].values() if value is not None]
    return 100 * min(held) if held else None


@dataclass(frozen=True)
class Sign:
    """A number that is cheap to watch during a stream and may warn of a collapse."""

    name: str
    """In tables."""
    title: str
    """In words."""
    falls: bool
    """Whether it warns by falling below its threshold, not by rising above it."""
    quantity: Quantity
    """Of a spot; rates are shown in %."""

    def value(self, spot: Spot) -> float | None:
        """In %."""
        return number(self.quantity(spot))

    def crossed(self, value: float | None, threshold: float) -> bool:
        """Whether `value` warns; what is not finite does."""
        if value is None:
            return False
        if not math.isfinite(value):
            return True
        return value < threshold if self.falls else value > threshold


SIGNS = (
    Sign("room", "room left, least of the layers", True, _room_left),
    Sign("norm", "‖Δ‖/‖W₀‖, most", False, update_share),
    Sign("at_edits", "‖h‖ at edited subjects", False, _grown(AT_EDITS)),
    Sign("on_text", "‖h‖ on other text", False, _grown(ON_TEXT)),
)


# -- what a collapse is --------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What counts as collapsed, and as well."""

    growth: float
    """Collapsed: perplexity has grown by this many %."""
    loss: float
    """Collapsed: the oldest cohort has lost this many % of the strict efficacy it began with."""
    healthy_growth: float
    """Well: perplexity has grown by less, %."""
    healthy_loss: float
    """Well: the oldest cohort has lost less, %."""
    oldest: int
    """Facts of the oldest cohort."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Bounds:
        """From a study's settings; ConfigError for what can't be."""
        for name in ("growth", "loss", "healthy_growth", "healthy_loss"):
            value = settings[name]
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of % above 0")
        found = cls(**{name: settings[name] for name in cls.__dataclass_fields__})
        if found.healthy_growth >= found.growth or found.healthy_loss >= found.loss:
            raise ConfigError(
                "healthy_growth and healthy_loss must lie below growth and loss: a stream is well "
                "before it has collapsed"
            )
        if not isinstance(found.oldest, int) or isinstance(found.oldest, bool) or found.oldest < 1:
            raise ConfigError(f"oldest is {found.oldest!r}; expected a number of facts above 0")
        return found

    def held(self, spot: Spot) -> Rate | None:
        """Strict efficacy of the oldest cohort."""
        cohort = spot.plan.facts[: self.oldest] if spot.plan else ()
        return rate(spot.rows, "efficacy_strict", [fact.id for fact in cohort])

    def first(self, along: Sequence[Spot]) -> Spot:
        """The first spot that has all of the oldest cohort; before it, the last one there is."""
        return next((spot for spot in along if spot.at >= self.oldest), along[-1])

    def cause(self, along: Sequence[Spot]) -> str:
        """Why a stream has collapsed at its last spot; empty if it has not."""
        now, said = along[-1], []
        if _perplexity(now) >= self.growth:
            grown = growth(now)
            said.append(f"perplexity {'without end' if grown is None else f'{grown:+.0f} %'}")
        if self._lost(along, now) >= self.loss:
            said.append(f"the oldest hold {number(self.held(now)):.0f} %")
        return ", ".join(said)

    def well(self, along: Sequence[Spot], now: Spot) -> bool:
        """Whether nothing is amiss yet."""
        return _perplexity(now) < self.healthy_growth and self._lost(along, now) < self.healthy_loss

    def state(self, along: Sequence[Spot], now: Spot) -> str:
        """`well`, `collapsed` or neither."""
        if now is along[-1] and self.cause(along):
            return "collapsed"
        return "well" if self.well(along, now) else ""

    def _lost(self, along: Sequence[Spot], now: Spot) -> float:
        """Of the strict efficacy that the oldest cohort began with, %."""
        began, held = (number(self.held(spot)) for spot in (self.first(along), now))
        return 100 * (1 - held / began) if began and held is not None else 100.0


def _perplexity(spot: Spot) -> float:
    value = growth(spot)
    return math.inf if value is None or math.isnan(value) else value


def collapsed(stream: Followed, bounds: Bounds) -> int | None:
    """Edits at the checkpoint where a stream had collapsed; None if it never did."""
    return stream.end.at if bounds.cause(stream.spots) else None


# -- thresholds, and what they are worth ---------------------------------------------------------


@dataclass(frozen=True)
class Warned:
    """When a sign warned on a stream, and how long before the collapse."""

    sign: Sign
    """Which."""
    threshold: float | None
    """%; None where the first stream set none."""
    crossed: int | None
    """Edits at the first checkpoint that crossed it; None: never."""
    before: int | None
    """Edits between that and the collapse; None where one of them is missing."""


def thresholds_of(stream: Followed, bounds: Bounds) -> dict[str, float | None]:
    """Sign -> its value at the last checkpoint at which the stream was well.

    None for all if the stream never collapsed or was never well: it says nothing of a collapse.
    """
    healthy: Spot | None = None
    for now in stream.spots:
        if not bounds.well(stream.spots, now):
            break
        healthy = now
    known = healthy if collapsed(stream, bounds) is not None else None
    return {sign.name: sign.value(known) if known else None for sign in SIGNS}


def warnings_on(
    stream: Followed, bounds: Bounds, thresholds: Mapping[str, float | None]
) -> list[Warned]:
    """When each sign warned on a stream."""
    found, end = [], collapsed(stream, bounds)
    for sign in SIGNS:
        bound = thresholds[sign.name]
        over = (s.at for s in stream.spots if bound and sign.crossed(sign.value(s), bound))
        crossed = next(over, None) if bound is not None else None
        before = None if crossed is None or end is None else end - crossed
        found.append(Warned(sign, bound, crossed, before))
    return found


def _warned(results: Results) -> list[tuple[Followed, list[Warned]]]:
    bounds = Bounds.of(results.settings)
    thresholds = thresholds_of(results.arms[0], bounds)
    return [(stream, warnings_on(stream, bounds, thresholds)) for stream in results.arms]


# -- tables and figures --------------------------------------------------------------------------


def _warnings(results: Results) -> Iterator[Mapping[str, Any]]:
    bounds = Bounds.of(results.settings)
    for i, (stream, warned) in enumerate(_warned(results)):
        for warning in warned:
            yield {
                "stream": stream.label + ("" if i else " (sets the thresholds)"),
                "signal": warning.sign.title,
                "threshold": warning.threshold,
                "crossed": warning.crossed,
                "collapsed": collapsed(stream, bounds),
                "before": warning.before,
                "cause": bounds.cause(stream.spots) or "no collapse",
            }


def _course(results: Results) -> Iterator[Cells]:
    bounds, (stream,) = Bounds.of(results.settings), results.arms
    for layer in stream.spots[0].found["room"]:
        share = _room_of(layer)
        yield Cells(head(f"room{layer}", f"room, layer {layer}"), share)
    for sign in SIGNS[1:]:
        yield Cells(head(sign.name, sign.title), sign.quantity)
    yield Cells(head("strict", "strict, all"), quantity("efficacy_strict"))
    yield Cells(head("oldest", "strict, oldest"), bounds.held)
    yield Cells(head("perplexity", "perplexity growth"), growth)
    yield Cells(head("kl", "KL per token", "mnat"), divergence)
    yield Cells(head("state", "state", ""), lambda spot: bounds.state(stream.spots, spot))


def _room_of(layer: str) -> Quantity:
    def share(spot: Spot) -> float | None:
        room: float | None = spot.found["room"][layer]
        return None if room is None else 100 * room

    return share


def _outcomes(results: Results) -> Iterator[Point]:
    held = Bounds.of(results.settings).held
    strict = quantity("efficacy_strict")
    panels = {"strict, all": strict, "strict, oldest": held, "perplexity growth": growth}
    yield from along(panels)(results)


def _ends(results: Results) -> str:
    bounds = Bounds.of(results.settings)
    found = [(stream.label, collapsed(stream, bounds)) for stream in results.arms]
    ends = ", ".join(f"{label} at {at}" for label, at in found if at is not None)
    said = f"Streams end where they collapse ({ends})." if ends else "None collapsed."
    return f"Signs along each stream. {said}"


def _shows(results: Results) -> str:
    bounds = Bounds.of(results.settings)
    (first, _), *others = _warned(results)
    for stream in results.arms:
        if collapsed(stream, bounds) is None:
            results.lab.notices.append(
                f"{stream.label}: had not collapsed after {stream.end.at} edits, where its facts "
                "ran out."
            )
    end = collapsed(first, bounds)
    if end is None:
        return (
            f"{first.label} did not collapse within {first.end.at} edits, so no threshold was set."
        )
    parts = [f"{first.label} collapsed at {end} edits ({bounds.cause(first.spots)})."]
    for stream, warned in others:
        end = collapsed(stream, bounds)
        if end is None:
            false = [w.sign.title for w in warned if w.crossed is not None]
            parts.append(
                f"{stream.label} did not collapse within {stream.end.at} edits; signs that warned "
                f"all the same: {', '.join(false) or 'none'}."
            )
            continue
        told = [
            f"{w.sign.title} never"
            if w.before is None
            else f"{w.sign.title} {w.before} edits before"
            for w in sorted(warned, key=lambda w: -(w.before or -1))
        ]
        parts.append(
            f"{stream.label} collapsed at {end} ({bounds.cause(stream.spots)}); with the first "
            f"stream's thresholds warned: {'; '.join(told)}."
        )
    return " ".join(parts)


def _until(lab: Lab) -> Callable[[Sequence[Spot]], bool]:
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
            named(numbered=True),
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
                        head("signal", "sign", ""),
                        head("threshold", "threshold"),
                        head("crossed", "crossed at", "", 0),
                        head("collapsed", "collapse at", "", 0),
                        head("before", "edits before", "", 0),
                        head("cause", "what had happened", ""),
                    ),
                    names=head("stream", "stream", ""),
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
                    names=Cells(head("edits", "edits", "", 0), lambda spot: str(spot.at)),
                    rows=lambda results: results.arms[0].spots,
                    each_arm=True,
                ),
            ),
            figures=(
                lines(
                    "signs",
                    _ends,
                    "%",
                    along({sign.title: sign.value for sign in SIGNS}),
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
            own_records=True,
            until=_until,
        ),
    ),
    valid=Bounds.of,
)
