"""The measures of an evaluation, as a reader is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nulledit.report.document import Column, Value
from nulledit.report.tables import METRICS

# Of these, shares are shown as percent.
_SUFFIXES = {"_strict": "strict", "_tokens": "tokens", "": "preference"}
_OWN = {
    "generation": "said in generation",
    "fluency": "fluency",
    "consistency": "consistency",
}


def measured(evaluations: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """The measures that any of the summaries has: rates first, as kinds come."""
    found: dict[str, None] = {}
    for evaluation in evaluations:
        if evaluation:
            found |= {k: None for k, rate in evaluation["rates"].items() if rate and rate["n"]}
            found |= {k: None for k in _OWN if (evaluation.get(k) or {}).get("n")}
    order = [kind + suffix for kind in METRICS for suffix in ("", "_strict", "_tokens")]
    return sorted(found, key=lambda k: order.index(k) if k in order else len(order))


def column(measure: str) -> Column:
    """A column of the measure's values over runs or models; higher is better in all of them."""
    if measure == "fluency":
        return Column(measure, label(measure), "high", "bits", 2)
    return Column(measure, label(measure), "high", "%")


def label(measure: str) -> str:
    """`efficacy, strict`."""
    if measure in _OWN:
        return _OWN[measure]
    for suffix, said in _SUFFIXES.items():
        if suffix and measure.endswith(suffix):
            return f"{measure.removesuffix(suffix).replace('_', ' ')}, {said}"
    return f"{measure.replace('_', ' ')}, preference"


def value(evaluation: Mapping[str, Any] | None, measure: str) -> Value | None:
    """The measure of a summary, in the column's unit; None where the data can't give it."""
    if not evaluation:
        return None
    rate = evaluation["rates"].get(measure) or evaluation.get(measure)
    if not rate or not rate["n"]:
        return None
    return Value(**rate) if measure == "fluency" else Value.percent(rate)


def scale(measure: str) -> float:
    """What a fact's own value is multiplied by to be in the column's unit."""
    return 1.0 if measure == "fluency" else 100.0
