"""The catalogue of measures: what each is called, counted in, and which way is better.

Evaluation, limits, tables, figures and studies read it; a new measure is a row here and a function
that gives its values by fact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

PREFERENCE = ("efficacy", "generalization", "specificity")
"""The three of every evaluation: the fact's own prompt, its paraphrases, its neighbours."""
STRICT = tuple(f"{name}_strict" for name in PREFERENCE)
TOKENS = tuple(f"{name}_tokens" for name in PREFERENCE)
WAYS = {"_strict": "strict", "_tokens": "tokens", "": "preference"}
"""How an answer counts, by the ending of a measure's name."""

RARE = "of 10,000"
"""Unit of what hardly any token does."""


@dataclass(frozen=True)
class Measure:
    """What a reader has to know of a number."""

    name: str
    """In rows of facts, in summaries and in JSON."""
    title: str
    """In tables and figures."""
    short: str = ""
    """In narrow heads; empty: the title."""
    unit: str = "%"
    """What is shown; values of `%` and `of 10,000` are shares, 0 to 1, until they are shown."""
    better: Literal["high", "low"] | None = "high"
    """Which way is better; None: neither."""
    digits: int = 1
    """Shown after the point."""

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be in `unit`."""
        return {"%": 100.0, RARE: 10_000.0}.get(self.unit, 1.0)

    @property
    def label(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def head(self, *, short: bool = False, digits: int | None = None) -> dict[str, Any]:
        """The fields of a table's column."""
        return {
            "key": self.name,
            "title": (self.short or self.title) if short else self.title,
            "better": self.better,
            "unit": self.unit,
            "digits": self.digits if digits is None else digits,
        }


OF_FACTS = (
    Measure("generation", "said in generation", "says it freely"),
    Measure("relation_specificity", "relation specificity", "other relations kept"),
    Measure("relation_kl", "KL at other relations", unit="nat", better="low", digits=2),
    Measure("fluency", "fluency", unit="bits", digits=2),
    Measure("consistency", "consistency"),
)
"""Values by fact that no query of an answer gives."""
AT_RELATIONS = ("relation_specificity", "relation_kl")
"""Those of prompts on other relations of the edited subjects, beside the base (`relations`)."""
OF_TEXT = (
    Measure("perplexity", "perplexity", unit="", better="low", digits=2),
    Measure("growth", "growth of perplexity", "growth", better="low"),
    Measure("kl", "KL per token", unit="mnat", better="low", digits=2),
    Measure("kl_worst", "KL, share of the worst 1 %", "KL in the worst 1 %", better=None),
    Measure("opening_rate", "tokens that open a gate, mean of gates", "mean gate", RARE, "low", 2),
    Measure("opening_worst", "the same, the worst gate", "worst gate", RARE, "low", 2),
    Measure("opening_any", "tokens that open any gate", "any gate", RARE, "low", 2),
)
"""Of a text that has nothing to do with the facts."""
OF_WEIGHTS = (
    Measure("norm_growth", "‖Δ‖/‖W₀‖", better="low"),
    Measure("hidden_growth", "growth of ‖h‖ at the edited subjects", better="low"),
    Measure("hidden_growth_text", "growth of ‖h‖ on a text", better="low"),
    Measure("leakage", "preserved keys' energy left open", better="low"),
    Measure("room_left", "usable directions that no edit took"),
    Measure("capability_drop", "probability lost on a task", better="low"),
)
"""Of the edited weights and what the model does with anything else."""
CATALOGUE = {m.name: m for m in (*OF_FACTS, *OF_TEXT, *OF_WEIGHTS)}
"""By name; those of a kind of query are made by `find`."""


def find(name: str) -> Measure:
    """The measure `name`: from the catalogue, or a kind of query and a way that it counts."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    ending = next(ending for ending in WAYS if name.endswith(ending))
    kind = name.removesuffix(ending).replace("_", " ")
    narrow = kind.replace("generalization", "generaliz.")
    short = f"{narrow}, {WAYS[ending]}" if ending else narrow
    return Measure(name, f"{kind}, {WAYS[ending]}", short)


def measured(summaries: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """The measures of facts that any of the summaries has: rates first, as kinds come."""
    found: dict[str, None] = {}
    for summary in summaries:
        if summary:
            found |= {k: None for k, rate in summary["rates"].items() if rate and rate["n"]}
            own = (m.name for m in OF_FACTS)
            found |= {k: None for k in own if (summary.get(k) or {}).get("n")}
    order = [kind + ending for kind in PREFERENCE for ending in ("", "_strict", "_tokens")]
    return sorted(found, key=lambda k: order.index(k) if k in order else len(order))


def entry(summary: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What a summary says of the measure `name`: mean or value, error, size; empty for nothing."""
    return (summary or {}).get(name) or (summary or {"rates": {}})["rates"].get(name) or {}


def shown(name: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    """An `entry` for a reader, in the measure's unit: value, standard error, and over how many."""
    measure = find(name)
    numbers = found.get("mean", found.get("value")), found.get("standard_error")
    value, error = ("" if x is None else f"{measure.scale * x:.{measure.digits}f}" for x in numbers)
    return value, error, f"{found['tokens']} tokens" if "tokens" in found else f"{found.get('n')}"
