"""Signs of a collapse to come, what counts as one, and how early a sign warns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.evaluation.hidden_norms import edit_rows, norm_growth, state_norms, text_rows
from nulledit.evaluation.stats import Rate
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.questions import Asked, Facts, Question
from nulledit.studies.results import Along, Quantity, Spot, growth, number, rate, update_share
from nulledit.studies.stream import StreamPlan

# -- signs ---------------------------------------------------------------------------------------


def _norms_at(name: str, rows_of: Callable[[Lab, Facts], Sequence[Any]]) -> Question:
    """‖h‖ after the last edited block at the ends of rows of tokens."""

    def ask(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
        rows, layer = rows_of(lab, facts), plan.recipe.layers[-1]
        settings = {"rows": hash_of([list(row) for row in rows]), "layer": layer}
        return settings, lambda editor: state_norms(editor.editable, rows, layer).tolist()

    return Question(name, ask)


def _room(lab: Lab, plan: StreamPlan, facts: Facts) -> Asked:
    """Share of each layer's usable directions that no edit has taken.

    Room is of the whole ledger, so a checkpoint before its end has none: it is asked after each
    batch, and only missing where an interruption came just between the two.
    """

    def room(editor: EditEngine) -> Any:
        at_end = len(editor.facts) == len(facts)
        return {str(r.layer): r.room if at_end else None for r in editor.weights.reports()}

    return {}, room


AT_EDITS = _norms_at("norm-at-edits", lambda lab, facts: edit_rows(lab.bench.model, facts))
ON_TEXT = _norms_at("norm-on-text", lambda lab, facts: text_rows(lab.windows()))
ROOM = Question("room", _room, of_base=False)


def _grown(question: Question) -> Quantity:
    """Growth of ‖h‖ since the unedited model."""

    def grown(spot: Spot) -> Rate | None:
        if spot.base is None:
            return None
        now = [math.nan if v is None else v for v in spot.found[question.name]]
        before = spot.base.found[question.name][: len(now)]
        return norm_growth(torch.tensor(before), torch.tensor(now))

    return grown


def room_left(spot: Spot, layer: str = "") -> float | None:
    """Of a layer, or the least of all, in %."""
    room = spot.found["room"]
    held = [value for value in ([room[layer]] if layer else room.values()) if value is not None]
    return 100 * min(held) if held else None


@dataclass(frozen=True)
class Sign:
    """A number that is cheap to watch during a stream and may warn of a collapse."""

    name: str
    """In tables."""
    title: str
    """In words."""
    quantity: Quantity
    """Of a spot; rates are shown in %."""
    falls: bool = False
    """Whether it warns by falling below its threshold, not by rising above it."""

    def crossed(self, spot: Spot, threshold: float) -> bool:
        """Whether it warns; what is not finite does."""
        value = number(self.quantity(spot))
        if value is None or not math.isfinite(value):
            return value is not None
        return value < threshold if self.falls else value > threshold


SIGNS = (
    Sign("room", "room left, least of the layers", room_left, falls=True),
    Sign("norm", "‖Δ‖/‖W₀‖, most", update_share),
    Sign("at_edits", "‖h‖ at edited subjects", _grown(AT_EDITS)),
    Sign("on_text", "‖h‖ on other text", _grown(ON_TEXT)),
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
        found = cls(**{name: settings[name] for name in cls.__dataclass_fields__})
        for name, value in vars(found).items():
            whole, of = name == "oldest", "facts" if name == "oldest" else "%"
            known = isinstance(value, int if whole else int | float) and value is not True
            if not known or not value > 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of {of} above 0")
        if found.healthy_growth >= found.growth or found.healthy_loss >= found.loss:
            raise ConfigError(
                "healthy_growth and healthy_loss must lie below growth and loss: a stream is well "
                "before it has collapsed"
            )
        return found

    def held(self, spot: Spot) -> Rate | None:
        """Strict efficacy of the oldest cohort."""
        cohort = spot.plan.facts[: self.oldest] if spot.plan else ()
        return rate(spot.rows, "efficacy_strict", [fact.id for fact in cohort])

    def cause(self, along: Along) -> str:
        """Why a stream has collapsed at its last spot; empty if it has not."""
        now, said = along[-1], []
        if _perplexity(now) >= self.growth:
            grown = growth(now)
            said.append(f"perplexity {'without end' if grown is None else f'{grown:+.0f} %'}")
        if self._lost(along, now) >= self.loss:
            said.append(f"the oldest hold {number(self.held(now)):.0f} %")
        return ", ".join(said)

    def collapsed(self, along: Along) -> int | None:
        """Edits at the checkpoint where a stream had collapsed, its last; None if it never did."""
        return along[-1].at if self.cause(along) else None

    def well(self, along: Along, now: Spot) -> bool:
        """Whether nothing is amiss yet."""
        lost = self._lost(along, now)
        return _perplexity(now) < self.healthy_growth and lost < self.healthy_loss

    def _lost(self, along: Along, now: Spot) -> float:
        """Of the strict efficacy that the oldest cohort, once it was all there, began with, %."""
        first = next((spot for spot in along if spot.at >= self.oldest), along[-1])
        began, held = (self.held(spot) for spot in (first, now))
        return 100 * (1 - held.mean / began.mean) if held and began and began.mean else 100.0


def _perplexity(spot: Spot) -> float:
    value = growth(spot)
    return math.inf if value is None or math.isnan(value) else value


# -- thresholds, and what they are worth ---------------------------------------------------------


def thresholds_of(spots: Along, bounds: Bounds) -> dict[str, float | None]:
    """Sign -> its value at the last checkpoint at which the stream was well.

    None for all if the stream never collapsed or was never well: it says nothing of a collapse.
    """
    healthy: Spot | None = None
    for now in spots if bounds.cause(spots) else ():
        if not bounds.well(spots, now):
            break
        healthy = now
    return {sign.name: number(sign.quantity(healthy)) if healthy else None for sign in SIGNS}


def warnings_on(
    spots: Along, bounds: Bounds, thresholds: Mapping[str, float | None]
) -> Iterator[dict[str, Any]]:
    """For each sign: when it first warned on a stream, and how many edits before the collapse."""
    end = bounds.collapsed(spots)
    for sign in SIGNS:
        bound = thresholds[sign.name]
        over = spots if bound is not None else ()
        crossed = next((s.at for s in over if sign.crossed(s, bound or 0.0)), None)
        before = None if crossed is None or end is None else end - crossed
        named = {"name": sign.name, "signal": sign.title, "threshold": bound}
        yield {**named, "crossed": crossed, "collapsed": end, "before": before}
