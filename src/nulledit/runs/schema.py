"""What the JSON of a run's folder must look like, which may come from anywhere."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from typing_extensions import TypedDict

from nulledit.evaluation.measures import OF_FACTS
from nulledit.io.settings import Expected, Whole
from nulledit.io.shapes import Finite, Measured, misfit

Environments = list[dict[str, Any]]
"""The content of `environment.json`."""


def _is_row(row: dict[str, Any]) -> bool:
    return all(not isinstance(value, str) or name == "answer" for name, value in row.items()) and (
        isinstance(row.get("answer"), str | None)
    )


_Row = Annotated[
    dict[str, str | bool | Measured], Expected("a fact's measures and its answer", _is_row)
]


class _Cause(TypedDict):
    name: str


class _Diagnosis(TypedDict):
    line: str
    causes: list[_Cause]


class Line(TypedDict):
    """One line of `results.jsonl`; lines from before it was looked for have no diagnosis."""

    id: str
    run: Whole
    column: Whole
    prompt: str
    target: str
    before: _Row | None
    after: _Row | None
    says_target: bool | None
    diagnosis: NotRequired[_Diagnosis | None]


class _Estimate(TypedDict):
    mean: Measured
    standard_error: Measured
    n: Whole


class _Perplexity(TypedDict):
    value: Measured
    standard_error: Measured
    tokens: Whole


class _Kl(_Perplexity):
    worst_share: Measured


class _Evaluation(TypedDict):
    rates: dict[str, _Rate | None]
    perplexity: NotRequired[_Perplexity | None]
    kl: NotRequired[_Kl | None]


def _has_measures(side: Any) -> bool:
    """No measure is called as the answer of a fact's row is."""
    each = [side.get(measure.name) for measure in OF_FACTS]
    return "answer" not in side["rates"] and not misfit(list[_Rate | None], each)


_Rate = Annotated[_Estimate, Expected("no more", lambda rate: len(rate) == 3, whole=False)]
_Side = Annotated[_Evaluation, Expected("rates of its measures", _has_measures, whole=False)]


class _Other(TypedDict):
    before: _Side
    after: _Side


class _Layer(TypedDict):
    layer: Whole
    protected: Whole
    d_in: Whole
    update_share: Measured
    free_share: Measured
    rounding_share: Measured
    error: NotRequired[Measured]
    error_standard_error: NotRequired[Measured]
    free_share_error: NotRequired[Measured]


class _Edit(TypedDict):
    run: Whole
    time: str
    facts: Whole
    known: Whole | None
    batches: list[Whole]
    before: _Side | None
    after: _Side | None
    text: str | None
    layers: list[_Layer]
    seconds: dict[str, Finite]
    notices: list[str]
    others: NotRequired[dict[str, _Other]]


def _belongs_together(edit: Any) -> bool:
    """Of chat prompts, `others` says of the same facts asked otherwise, `asked` how they were."""
    asked = not edit.get("others") or isinstance(edit.get("asked"), str)
    both = (edit["before"] is None) == (edit["after"] is None)
    return asked and both and len(edit["batches"]) in (0, 2)


class _Base(TypedDict):
    model: str | None
    hash: str
    dtype: str


class Summary(TypedDict):
    """The content of `summary.json`."""

    version: str
    state: str
    base: _Base
    facts: Whole
    batches: Whole
    runs: list[Annotated[_Edit, Expected("what belongs together", _belongs_together, whole=False)]]
