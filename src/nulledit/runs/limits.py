"""Limits for an edited model, from a YAML file: what may fall or grow, and how far."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from nulledit.data.facts import Fact, quote, suggest
from nulledit.errors import ConfigError
from nulledit.evaluation.measures import AT_RELATIONS, RARE
from nulledit.evaluation.tasks import TASKS
from nulledit.io.settings import (
    Count,
    Expected,
    Number,
    Several,
    checked,
    load_settings,
    read_settings,
    shown,
)

SHIPPED = "default"
Percent = Annotated[float, Expected("0 to 100, in %", ge=0, le=100)]


@checked
@dataclass(frozen=True, kw_only=True)
class Bound:
    """What every limit has."""

    optional: bool = False
    """Where it can't be measured it is left out, and said so; otherwise that is a failure."""


@checked
@dataclass(frozen=True, kw_only=True)
class Most(Bound):
    """An upper bound on a number that is no estimate: it is read off the weights."""

    at_most: Number
    """%, or points of %."""


@checked
@dataclass(frozen=True, kw_only=True)
class Least(Bound):
    """A lower bound on such a number."""

    at_least: Percent
    """%."""

    def __post_init__(self) -> None:
        if 0 < self.at_least <= 1:  # 0.8 % is what no one means, and all would pass
            raise ConfigError(
                f"at_least is {self.at_least}; numbers are in %: write {100 * self.at_least:g}"
            )


@checked
@dataclass(frozen=True, kw_only=True)
class SampledMost(Most):
    """An upper bound on an estimate."""

    confident: bool = False
    """Demand that the bound holds by one-sided 95 %, not only for what was found."""


@checked
@dataclass(frozen=True, kw_only=True)
class SampledLeast(Least):
    """A lower bound on an estimate."""

    confident: bool = False
    """Demand that the bound holds by one-sided 95 %, not only for what was found."""


@checked
@dataclass(frozen=True, kw_only=True)
class Oldest(SampledLeast):
    """A lower bound for the facts that were edited first."""

    first: Count = 100
    """Facts of the cohort, without those to forget; a model with fewer is asked about all."""


@checked
@dataclass(frozen=True, kw_only=True)
class Tasks(SampledMost):
    """An upper bound for each of some tasks."""

    tasks: Several[str] = tuple(TASKS)
    """Names of tasks; each is a row of its own."""
    items: Count = 50
    """Questions of each."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"tasks is empty; expected some of {', '.join(TASKS)}")
        for name in self.tasks:
            if name not in TASKS:
                raise ConfigError(
                    f"tasks: no task {quote(name)}{suggest(name, TASKS)}; known: {', '.join(TASKS)}"
                )


@dataclass(frozen=True)
class Kind:
    """A limit that a file may name."""

    settings: type[Bound]
    """What is given under its name."""
    about: str
    """What is measured."""
    needs: str
    """What is read for it: weights, facts, hidden, text or tasks."""
    unit: str = "%"
    """Of its number."""
    signed: bool = True
    """Whether its number may be below 0."""


def _rates() -> Iterator[tuple[str, Kind]]:
    asked = {
        "efficacy": "the facts' own prompts",
        "generalization": "their paraphrases",
        "specificity": "their neighbours' answers",
    }
    ways = {"": "preferred to the other answer", "_strict": "every token the likeliest"}
    for name, what in asked.items():
        for suffix, how in ways.items():
            yield name + suffix, Kind(SampledLeast, f"{what}: {how}", "facts")
    for suffix, how in ways.items():
        about = f"points of specificity lost to the base model ({how})"
        yield f"specificity{suffix}_drop", Kind(SampledMost, about, "facts")


KINDS: Mapping[str, Kind] = {
    **dict(_rates()),
    "oldest_cohort": Kind(Oldest, "strict efficacy of the facts edited first", "facts"),
    "relation_specificity": Kind(
        SampledLeast,
        "prompts on other relations of the facts' subjects: the base's likeliest token stays",
        "facts",
    ),
    "relation_kl": Kind(
        SampledMost,
        "KL there of the base's next token from the edited one's",
        "facts",
        "nat",
        signed=False,
    ),
    "perplexity_growth": Kind(SampledMost, "growth of perplexity on a text", "text"),
    "kl": Kind(
        SampledMost,
        "KL per token of the base's next token from the edited one's",
        "text",
        "mnat",
        signed=False,
    ),
    "opening_rate": Kind(
        SampledMost,
        "tokens of a text that open a gate of gated edits, mean of gates",
        "text",
        RARE,
        signed=False,
    ),
    "opening_worst": Kind(
        Most, "the same of the gate that opens the most often", "text", RARE, signed=False
    ),
    "opening_any": Kind(
        SampledMost, "tokens of a text that open any gate", "text", RARE, signed=False
    ),
    "capability_drop": Kind(
        Tasks, "points of the right answer's probability lost on a task", "tasks"
    ),
    "norm_growth": Kind(Most, "‖Δ‖/‖W₀‖, most of the layers", "weights", signed=False),
    "displacement": Kind(
        Most,
        "‖ΔK‖/‖WK‖ of a batch at the keys of facts before it, most of all",
        "weights",
        signed=False,
    ),
    "hidden_growth": Kind(SampledMost, "growth of ‖h‖ at the edited subjects", "hidden"),
    "hidden_growth_text": Kind(SampledMost, "growth of ‖h‖ on a text", "text"),
    "leakage": Kind(
        Most,
        "share of the preserved keys' energy left open, most of the layers",
        "weights",
        signed=False,
    ),
    "room_left": Kind(
        Least, "share of usable directions that no edit took, least of the layers", "weights"
    ),
}
"""Limits by name; numbers are in %, or in points of %, but for those with a unit of their own."""


@dataclass(frozen=True)
class Limits:
    """A set of limits, as a file names them."""

    kind: ClassVar[str] = "limits"
    folder: ClassVar[str] = "limits"

    bounds: Mapping[str, Bound]
    """Name -> bound, in the file's order."""
    source: str = ""
    """File name, or the name of the shipped set."""

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "") -> Limits:
        """From plain data; ConfigError for unknown names, wrong types and numbers that can't be."""
        if not isinstance(data, Mapping) or not data:
            raise ConfigError(
                f"expected limits by name, such as `efficacy_strict: {{at_least: 80}}`, found "
                f"{quote(data)}"
            )
        return cls({name: _bound(name, given) for name, given in data.items()}, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {
            name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(bound).items()
            }
            for name, bound in self.bounds.items()
        }

    def needs(self, what: str) -> bool:
        """Whether a limit reads `what`: weights, facts, hidden, text or tasks."""
        return any(KINDS[name].needs == what for name in self.bounds)


def load_limits(name_or_path: str | Path = SHIPPED) -> Limits:
    """Limits from a YAML file; `default` is the set that comes with the package."""
    return dataclasses.replace(load_settings(Limits, name_or_path), source=Path(name_or_path).name)


def _bound(name: object, given: Any) -> Bound:
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(
            f"no limit {quote(name)}{suggest(name, KINDS)}; known: {', '.join(KINDS)}"
        )
    kind = KINDS[name].settings
    side = "at_least" if issubclass(kind, Least) else "at_most"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {shown(given)}; expected `{name}: {{{side}: NUMBER}}`")
    other = {"at_least": "at_most", "at_most": "at_least"}[side]
    if side not in given:
        found = f"has {other}" if other in given else "names no bound"
        raise ConfigError(f"{name} {found}; expected {side}, in {KINDS[name].unit}")
    try:
        bound = read_settings(kind, given)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if isinstance(bound, Most) and bound.at_most < 0 and not KINDS[name].signed:
        raise ConfigError(
            f"{name}: at_most is {bound.at_most:g}; expected a number from 0, in "
            f"{KINDS[name].unit}: it is never below"
        )
    return bound


def why_absent(measure: str, facts: Sequence[Fact]) -> str:
    """Why a measure of `facts` has no value."""
    if not facts:
        return "no facts in the model"
    lacking = {
        "efficacy": "no fact has an old answer to prefer the new one to",
        "generalization": "no fact has a paraphrase",
        "generalization_strict": "no fact has a paraphrase",
        "specificity": "no fact has a neighbour with an answer",
        "specificity_strict": "no fact has a neighbour with an answer",
        **dict.fromkeys(AT_RELATIONS, "no fact has a prompt on another relation of its subject"),
    }
    found = lacking.get(measure, "the facts lack what it needs")
    if measure.startswith(("efficacy", "generalization")) and all(fact.forget for fact in facts):
        found = "all facts are to be forgotten"
    elif measure == "generalization" and any(fact.paraphrases for fact in facts):
        found = "no fact with a paraphrase has an old answer"
    return found
