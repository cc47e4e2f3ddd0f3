"""What a study asked and found: a model at a checkpoint, an arm along its stream, all of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import find
from nulledit.evaluation.stats import Interval, Rate, growth_of, paired_bootstrap
from nulledit.report.document import Value
from nulledit.studies.context import Lab
from nulledit.studies.stream import StreamPlan

Rows = Mapping[str, Mapping[str, Any]]
"""Fact id (or another name) -> measure -> value."""
Quantity = Callable[["Spot"], Rate | Value | float | None]
"""A number of a model as it was asked; rates are shares until they are shown."""


@dataclass(frozen=True)
class Work:
    """What a study does, for an estimate: the streams' plans and what is asked of them."""

    plans: Sequence[Any]
    """Stream plans."""
    asked: float = 0
    """Facts asked about, over all checkpoints."""
    written: float = 0
    """Facts whose free answers or longer texts are generated."""
    perplexities: float = 0
    """Readings of the text: perplexity and KL."""
    capabilities: float = 0
    """Rounds of the six tasks."""
    drifts: float = 0
    """Drifts of hidden states."""
    other_tokens: float = 0
    """Tokens run for anything else."""


@dataclass(frozen=True)
class Arm:
    """One stream of a study: a change of the recipe, and how its queue is edited."""

    label: str
    """What tables call it."""
    recipe: str | Mapping[str, Any]
    """An arm of the scale, or fields of the base recipe that differ."""
    batch_size: int | None = None
    """Facts solved together; None: the study's setting."""
    order: Callable[[Fact], Any] | None = None
    """What the queue is sorted by; None: the seed's order."""
    statistics: Any = None
    """A folder with statistics of its own; None: those found for the model."""
    against: str = ""
    """Label of the arm that it is compared with."""
    pair: str = ""
    """What figures call that comparison; empty: its own label."""
    x: float | None = None
    """Its place on a figure's axis, where that is no number of edits."""


@dataclass(frozen=True)
class Spot:
    """A model as it was asked: an arm at a checkpoint, the unedited one, or one that is no edit."""

    label: str
    """The arm, or what is there in its place."""
    at: int = 0
    """Facts edited."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Question -> its answer, plain data."""
    base: Spot | None = None
    """The unedited model; None for itself."""
    plan: StreamPlan | None = None
    """The arm's stream."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that no question gives, such as seconds."""

    @cached_property
    def rows(self) -> Rows:
        """Fact id -> measure -> value, of all facts so far."""
        rows = {key: dict(row) for key, row in self.found.get("facts", {}).items()}
        for key, said in self.found.get("spoken", {}).items():
            rows[key] |= {name: said[name] for name in ("answer", "generation")}
        for key, bits in self.found.get("fluency", {}).get("fluency", {}).items():
            rows[key]["fluency"] = bits
        return rows


@dataclass(frozen=True)
class Followed:
    """One arm's stream, asked at its checkpoints."""

    arm: Arm
    """As declared."""
    plan: StreamPlan
    """Its stream."""
    spots: tuple[Spot, ...]
    """In order; at least one."""

    @property
    def label(self) -> str:
        """The arm's."""
        return self.plan.label

    @property
    def end(self) -> Spot:
        """The last checkpoint."""
        return self.spots[-1]


@dataclass(frozen=True)
class Results:
    """All that a part of a study found."""

    lab: Lab
    """Model, data and settings."""
    title: str = ""
    """What tables call the data."""
    base: Spot | None = None
    """The unedited model, asked about the first arm's queue."""
    arms: tuple[Followed, ...] = ()
    """The streams."""
    others: tuple[Spot, ...] = ()
    """Models that are no edit."""
    made: Any = None
    """What the part's `prepare` gave."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The study's."""
        return self.lab.settings

    @property
    def queue(self) -> tuple[Fact, ...]:
        """The first arm's."""
        return self.arms[0].plan.facts

    @property
    def ends(self) -> list[Spot]:
        """Each arm at its last checkpoint."""
        return [arm.end for arm in self.arms]

    @property
    def rows(self) -> list[Spot]:
        """The unedited model, each arm at its end, and what is no edit."""
        return [*([self.base] if self.base else []), *self.ends, *self.others]

    def pairs(self) -> Iterator[tuple[str, Spot, Spot]]:
        """(label, the arm compared with, the arm) of each arm that is compared with another."""
        ends = {arm.label: arm.end for arm in self.arms}
        for arm in self.arms:
            if arm.arm.against:
                yield arm.arm.pair or arm.label, ends[arm.arm.against], arm.end

    def text(self, template: str | Callable[[Results], str]) -> str:
        """A caption or title with the settings and `edits`, `data` and `arm` (the first) put in."""
        if callable(template):
            return template(self)
        named = {"data": self.title}
        if self.arms:
            named |= {"edits": str(len(self.queue)), "arm": self.arms[0].label}
        return template.format_map({**self.settings, **named})


# -- quantities ----------------------------------------------------------------------------------


def rate(rows: Rows, measure: str, ids: Iterable[str] | None = None) -> Rate | None:
    """A measure's mean over facts that have it; None if none has."""
    chosen = rows.values() if ids is None else [rows[i] for i in ids if i in rows]
    values = [float(row[measure]) for row in chosen if row.get(measure) is not None]
    return Rate.of(values) if values else None


def growth(spot: Spot) -> float | None:
    """Perplexity's growth in %; None of the unedited model, without a text, or for no number."""
    now = spot.found.get("text")
    if now is None or spot.base is None or now["perplexity"]["value"] is None:
        return None
    return growth_of(spot.base.found["text"]["perplexity"]["value"], now["perplexity"]["value"])


def divergence(spot: Spot) -> Value | None:
    """KL per token from the unedited model; n counts tokens."""
    text = spot.found.get("text")
    if text is None:
        return None
    if spot.base is None:
        return Value(0.0, None, text["perplexity"]["tokens"])
    kl = text["kl"]
    return Value(kl["value"], kl["standard_error"], kl["tokens"]) if kl else None


def _perplexity(spot: Spot) -> Value | None:
    text = (spot.found.get("text") or {}).get("perplexity")
    return Value(text["value"], text["standard_error"], text["tokens"]) if text else None


def _worst(spot: Spot) -> float | None:
    kl = (spot.found.get("text") or {}).get("kl") if spot.base else None
    share: float | None = kl["worst_share"] if kl else None
    return share and 100 * share


def update_share(spot: Spot) -> float | None:
    """Largest ‖Δ‖/‖W₀‖ of a layer, in %; None of the unedited model."""
    shares = spot.found.get("norms")
    return 100 * max(shares.values()) if shares else None


OF_TEXT: Mapping[str, Quantity] = {
    "perplexity": _perplexity,
    "growth": growth,
    "kl": divergence,
    "kl_worst": _worst,
}


def quantity(name: str) -> Quantity:
    """A measure of the catalogue as a function of a spot."""
    return OF_TEXT[name] if name in OF_TEXT else lambda spot: rate(spot.rows, name)


def number(value: Rate | Value | float | None) -> float | None:
    """A quantity as it is shown: rates in %."""
    if isinstance(value, Rate):
        return 100 * value.mean
    return value.mean if isinstance(value, Value) else value


def difference(before: Rows, after: Rows, measure: str) -> tuple[Interval, int] | None:
    """Mean of after − before over rows that both have, in %, its 95 % interval, and n."""
    shared = [
        i
        for i in before
        if i in after and before[i].get(measure) is not None and after[i].get(measure) is not None
    ]
    if not shared:
        return None
    pair = [[float(side[i][measure]) for i in shared] for side in (before, after)]
    return Interval(*(100 * end for end in paired_bootstrap(*pair))), len(shared)


# -- words ---------------------------------------------------------------------------------------


def extremes(named: Mapping[str, float]) -> str:
    """`94.0 % (a) down to 82.0 % (b, c)`: the ends with everyone who is there, as rounded."""
    shown = {name: f"{value:.1f} %" for name, value in named.items()}
    high, low = (shown[pick(named, key=lambda name: named[name])] for pick in (max, min))
    ends = {end: ", ".join(n for n, text in shown.items() if text == end) for end in (high, low)}
    if high == low:
        return f"{high} with {ends[high]}"
    return f"from {high} ({ends[high]}) down to {low} ({ends[low]})"


def numbers(spots: Iterable[Spot], what: Quantity) -> dict[str, float]:
    """Label -> the quantity as it is shown, of the spots that have it."""
    found = {spot.label: number(what(spot)) for spot in spots}
    return {label: value for label, value in found.items() if value is not None}


def short(measure: str) -> str:
    """What narrow heads call a measure."""
    return find(measure).short or find(measure).title
