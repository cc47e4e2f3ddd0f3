"""What a study asked and found: a model at a checkpoint, and all of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import find
from nulledit.evaluation.stats import Interval, Rate, growth_of, paired_interval
from nulledit.report.document import Value
from nulledit.studies.context import Lab
from nulledit.studies.stream import StreamPlan

Rows = Mapping[str, Mapping[str, Any]]
"""Fact id (or another name) -> measure -> value."""
Number = Rate | Value | Mapping[str, Any] | float | None
"""Rates, and rates as plain data, are shares until they are shown."""
Quantity = Callable[["Spot"], Number]
"""A number of a model as it was asked."""


@dataclass(frozen=True)
class Work:
    """What a study does, for an estimate: the streams' plans and what is asked of them."""

    plans: Sequence[Any]
    asked: int = 0
    """Facts asked about, over all checkpoints."""
    written: int = 0
    """Facts whose free answers or longer texts are generated."""
    perplexities: int = 0
    """Readings of the text: perplexity and KL."""
    capabilities: int = 0
    """Rounds of the six tasks."""
    drifts: int = 0
    other_tokens: int = 0
    """Tokens run for anything else."""


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


Along = Sequence[Spot]
"""An arm at its checkpoints, in order; at least one."""


@dataclass(frozen=True)
class Results:
    """All that a part of a study found."""

    lab: Lab
    """Model, data and settings."""
    title: str = ""
    """What tables call the data."""
    arms: tuple[Along, ...] = ()
    made: Any = None
    """What the part's `prepare` gave."""
    others: tuple[Spot, ...] = ()
    """Models that are no edit."""

    @property
    def base(self) -> Spot:
        """The unedited model, asked about the first arm's queue."""
        found = self.arms[0][0].base
        assert found
        return found

    @property
    def queue(self) -> tuple[Fact, ...]:
        """The first arm's."""
        return self.base.plan.facts if self.base.plan else ()

    @property
    def ends(self) -> list[Spot]:
        """Each arm at its last checkpoint."""
        return [along[-1] for along in self.arms]

    @property
    def rows(self) -> list[Spot]:
        """The unedited model, each arm at its end, and what is no edit."""
        return [self.base, *self.ends, *self.others]

    def pairs(self) -> Iterator[tuple[str, Spot, Spot]]:
        """(method, the arm compared with, the arm) of each arm that is compared with another."""
        ends = {spot.label: spot for spot in self.ends}
        for spot in self.ends:
            if spot.plan and spot.plan.against:
                yield spot.label.partition(",")[0], ends[spot.plan.against], spot

    def text(self, template: str) -> str:
        """A caption or title with the settings and `edits`, `data` and `arm` (the first) put in."""
        named = {"edits": len(self.queue), "arm": self.ends[0].label} if self.arms else {}
        return template.format_map({**self.lab.settings, **named, "data": self.title})


Findings = Callable[[Results], str]
"""What the numbers of a part show, made from them."""

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


def _of_text(spot: Spot, what: str) -> Value | None:
    """Perplexity, or KL per token from the unedited model; n counts tokens."""
    text = spot.found.get("text")
    if text and spot.base is None and what == "kl":
        return Value(0.0, None, text["perplexity"]["tokens"])
    held = text and text[what]
    return Value(held["value"], held["standard_error"], held["tokens"]) if held else None


def divergence(spot: Spot) -> Value | None:
    """KL per token from the unedited model, mnat."""
    return _of_text(spot, "kl")


def _worst(spot: Spot) -> float | None:
    kl = (spot.found.get("text") or {}).get("kl")
    return 100 * kl["worst_share"] if kl and kl["worst_share"] is not None else None


def update_share(spot: Spot) -> float | None:
    """Largest ‖Δ‖/‖W₀‖ of a layer, in %; None of the unedited model."""
    shares = spot.found.get("norms")
    return 100 * max(shares.values()) if shares else None


OF_TEXT: Mapping[str, Quantity] = {
    "perplexity": lambda spot: _of_text(spot, "perplexity"),
    "growth": growth,
    "kl": divergence,
    "kl_worst": _worst,
}


def quantity(name: str) -> Quantity:
    """A measure of the catalogue as a function of a spot."""
    return OF_TEXT[name] if name in OF_TEXT else lambda spot: rate(spot.rows, name)


def shown(value: Any) -> Any:
    """A number as tables have it: rates in %."""
    return Value.percent(value) if isinstance(value, Rate | Mapping) else value


def number(value: Number) -> float | None:
    """A number as it is shown, without its error."""
    found = shown(value)
    mean: float | None = found.mean if isinstance(found, Value) else found
    return mean


def numbers(spots: Iterable[Spot], what: Quantity) -> dict[str, float]:
    """Label -> the quantity as it is shown, of the spots that have it."""
    found = {spot.label: number(what(spot)) for spot in spots}
    return {label: value for label, value in found.items() if value is not None}


def difference(before: Rows, after: Rows, measure: str) -> tuple[Interval, int] | None:
    """Mean of after − before over rows that both have, in %, its 95 % interval, and n."""
    both = [i for i in before if i in after]
    pairs = [(before[i].get(measure), after[i].get(measure)) for i in both]
    known = [(float(a), float(b)) for a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    found = paired_interval([a for a, _ in known], [b for _, b in known])
    return Interval(*(100 * end for end in found)), len(known)


# -- findings ------------------------------------------------------------------------------------


def short(measure: str) -> str:
    """What narrow heads call a measure."""
    return find(measure).short or find(measure).title


def extremes(named: Mapping[str, float]) -> str:
    """`from 94.0 % (a) down to 82.0 % (b, c)`: the ends with everyone who is there, as rounded."""
    texts = {name: f"{value:.1f} %" for name, value in named.items()}
    high, low = (texts[pick(named, key=lambda name: named[name])] for pick in (max, min))
    ends = {end: ", ".join(n for n, text in texts.items() if text == end) for end in (high, low)}
    if high == low:
        return f"{high} with {ends[high]}"
    return f"from {high} ({ends[high]}) down to {low} ({ends[low]})"


def best_and_worst(
    *measures: str, first: str = "After {edits} edits on {data}", least: float = 0
) -> Findings:
    """Where arms end by each measure; of those of at least `least` % in the first measure."""

    def told(results: Results) -> str:
        whole = [s for s in results.ends if (number(quantity(measures[0])(s)) or 0) >= least]
        found = {short(name): numbers(whole, quantity(name)) for name in measures}
        parts = [f"{name} {extremes(named)}" for name, named in found.items() if named]
        return f"{results.text(first)}: {'; '.join(parts)}." if parts else ""

    return told


def changes(*measures: str, first: str) -> Findings:
    """How each arm differs from the one that it is compared with."""

    def told(results: Results) -> str:
        said = []
        for label, before, after in results.pairs():
            parts = []
            for name in measures:
                if found := difference(before.rows, after.rows, name):
                    mean, low, high = found[0]
                    parts.append(f"{short(name)} {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
            grown = [growth(spot) for spot in (before, after)]
            if None not in grown:
                parts.append(f"growth of perplexity {grown[0]:.1f} to {grown[1]:.1f} %")
            said.append(f"{label}: {', '.join(parts) or 'nothing measurable'}.")
        return " ".join([f"{first}.", *said])

    return told
